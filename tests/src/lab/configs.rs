//! The configuration files of a lab's daemons: the documentation's examples with the lab's addresses and paths, and
//! every other setting left at its default unless a test asks for something else.

use super::network::{DB, GATEWAY_IP, READERS, WRITER, ip_of};
use anyhow::{Context as _, Result};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// What mmm_helperd runs to start and to stop the server of a host, in the host's folder.
pub const START: &str = "start-mysqld";
pub const STOP: &str = "stop-mysqld";

/// Lines that differ from the defaults.
#[derive(Clone, Debug, Default)]
pub struct Extra {
    /// At the top of mmm_common.toml, e.g. `lease_ttl = "5s"`.
    pub common: Vec<String>,
    /// In `[monitor]` of mmm_mon.toml, e.g. `auto_set_online = "1s"`.
    pub monitor: Vec<String>,
    /// In `[agent]` of every host's mmm_agent.toml, e.g. `on_hang = "kill"`.
    pub agent: Vec<String>,
}

pub fn monitor_file(dir: &Path) -> PathBuf {
    dir.join("mon/mmm_mon.toml")
}

pub fn agent_file(dir: &Path, host: &str) -> PathBuf {
    dir.join(host).join("mmm_agent.toml")
}

/// Writes all of them; a host's folder must exist.
pub fn write(dir: &Path, extra: &Extra) -> Result<()> {
    let common = dir.join("mmm_common.toml");
    save(&common, &common_text(&extra.common)?)?;
    save(&monitor_file(dir), &monitor_text(&common, dir, &extra.monitor)?)?;
    for host in DB {
        save(&agent_file(dir, host), &agent_text(&common, dir, host, &extra.agent))?;
    }
    Ok(())
}

fn common_text(extra: &[String]) -> Result<String> {
    let mut text = format!(
        r#"# Written by the lab.
active_master_role = "writer"
insecure_plaintext = true
{}
[host.default]
cluster_interface    = "eth0"
agent_user           = "mmm_agent"
agent_password       = "RepAgent"
replication_user     = "replication"
replication_password = "slave"
"#,
        lines(extra)
    );
    for host in DB {
        let more = match host {
            "db1" => "mode = \"master\"\npeer = \"db2\"",
            "db2" => "mode = \"master\"\npeer = \"db1\"",
            _ => "mode = \"slave\"",
        };
        text.push_str(&format!("\n[host.{host}]\nip   = \"{}\"\n{more}\n", ip_of(host)?));
    }
    let readers = READERS.map(|ip| format!("\"{ip}\"")).join(", ");
    text.push_str(&format!(
        r#"
[role.writer]
mode  = "exclusive"
hosts = ["db1", "db2"]
ips   = ["{WRITER}"]

[role.reader]
mode  = "balanced"
hosts = ["db1", "db2", "db3"]
ips   = [{readers}]
"#
    ));
    Ok(text)
}

fn monitor_text(common: &Path, dir: &Path, extra: &[String]) -> Result<String> {
    Ok(format!(
        r#"# Written by the lab.
include = ["{}"]

[monitor]
ip          = "127.0.0.1"
status_path = "{}"
ping_ips    = ["{GATEWAY_IP}"]
{}
[host.default]
monitor_user     = "mmm_monitor"
monitor_password = "RepMonitor"
"#,
        common.display(),
        dir.join("mon/mmm_mond.status").display(),
        lines(extra)
    ))
}

fn agent_text(common: &Path, dir: &Path, host: &str, extra: &[String]) -> String {
    format!(
        r#"# Written by the lab.
include = ["{1}"]
this = "{host}"

[agent]
state_path          = "{0}/mmm_agentd.state"
mysql_socket        = "{0}/mysqld.sock"
mysql_pid_file      = "{0}/mysqld.pid"
datadir             = "{0}/data"
mysql_start_command = "{0}/{START}"
mysql_stop_command  = "{0}/{STOP}"
{2}"#,
        dir.join(host).display(),
        common.display(),
        lines(extra)
    )
}

fn lines(extra: &[String]) -> String {
    extra.iter().map(|l| format!("{l}\n")).collect()
}

/// The daemons refuse a file with passwords that others can read.
fn save(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).with_context(|| format!("chmod {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daemons_understand_what_the_lab_writes() {
        let dir = tempfile::tempdir().unwrap();
        for host in DB.iter().chain(["mon"].iter()) {
            fs::create_dir(dir.path().join(host)).unwrap();
        }
        let extra = Extra {
            common: vec!["lease_ttl = \"5s\"".to_owned()],
            monitor: vec!["auto_set_online = \"7s\"".to_owned()],
            agent: vec!["watchdog_device = \"\"".to_owned()],
        };
        write(dir.path(), &extra).unwrap();
        let monitor = mmm_common::config::parse::monitor(&monitor_file(dir.path())).unwrap();
        assert_eq!(monitor.cluster.lease_ttl.as_secs(), 5);
        assert_eq!(monitor.auto_set_online.as_secs(), 7);
        assert_eq!(monitor.cluster.addresses().len(), 4);
        for host in DB {
            let agent = mmm_common::config::parse::agent(&agent_file(dir.path(), host)).unwrap();
            assert_eq!(agent.this.as_str(), host);
            assert!(agent.mysql_socket.is_some());
        }
    }
}
