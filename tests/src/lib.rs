//! What the tests that span crates stand on: [`lab`] has hosts in network namespaces with real servers.

pub mod lab;
pub mod world;
