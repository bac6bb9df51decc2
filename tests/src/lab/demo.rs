//! placeholder
use anyhow::Result;
pub fn run(_id: Option<String>, _server: String, _stay: bool) -> Result<()> { Ok(()) }
