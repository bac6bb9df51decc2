//! Configuration files in, mistakes out.
//!
//! Every test writes files into a folder of its own and goes through [`check`], which also sees to it that no mistake
//! repeats a password.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use mmm_common::config::parse::{self, Mistake};
use mmm_common::config::{Agent, Cluster, Monitor, OnDrainTimeout, OnHang, ServerControl};
use mmm_common::ids::{HostName, RoleName};
use mmm_common::state::{CheckKind, HostMode, MonitorMode, RoleMode};
use proptest::prelude::*;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const COMMON: &str = r#"
active_master_role = "writer"

[host.default]
cluster_interface = "eth0"
agent_user = "mmm_agent"
agent_password = "SeCrEt-agent"
replication_user = "replication"
replication_password = "SeCrEt-replication"

[host.db1]
ip = "127.0.0.31"
mode = "master"
peer = "db2"

[host.db2]
ip = "127.0.0.32"
mode = "master"
peer = "db1"

[host.db3]
ip = "127.0.0.33"
mode = "slave"

[role.writer]
mode = "exclusive"
hosts = ["db1", "db2"]
ips = ["192.168.0.50"]

[role.reader]
mode = "balanced"
hosts = ["db1", "db2", "db3"]
ips = ["192.168.0.51", "192.168.0.52"]
"#;

const MON: &str = r#"
include = ["mmm_common.toml"]

[monitor]
ping_ips = ["192.168.0.1"]

[host.default]
monitor_user = "mmm_monitor"
monitor_password = "SeCrEt-monitor"
"#;

const AGENT: &str = r#"
include = ["mmm_common.toml"]
this = "db1"
"#;

/// Reads the first of these files as the program of its name does, and compares all mistakes with what is expected:
/// one per line, as `--check-config` prints them, file names without the folder. Nothing expected: no mistake.
#[track_caller]
fn check(files: &[(&str, &str)], expected: &str) {
    let folder = Folder::with(files);
    let found = folder.mistakes(files[0].0);
    assert!(!found.contains("SeCrEt"), "a mistake repeats a password:\n{found}");
    let expected: Vec<&str> = expected.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let found: Vec<&str> = found.lines().collect();
    assert_eq!(found, expected, "\nfound:\n{}\n", found.join("\n"));
}

/// A mistake in mmm_common.toml, seen by the monitor.
#[track_caller]
fn common(from: &str, to: &str, expected: &str) {
    check(&[("mmm_mon.toml", MON), ("mmm_common.toml", &with(COMMON, from, to))], expected);
}

/// A mistake in mmm_mon.toml.
#[track_caller]
fn mon(from: &str, to: &str, expected: &str) {
    check(&[("mmm_mon.toml", &with(MON, from, to)), ("mmm_common.toml", COMMON)], expected);
}

/// A mistake in mmm_agent.toml.
#[track_caller]
fn agent(from: &str, to: &str, expected: &str) {
    check(&[("mmm_agent.toml", &with(AGENT, from, to)), ("mmm_common.toml", COMMON)], expected);
}

#[track_caller]
fn with(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "the test changes {from:?}, which is not there");
    text.replacen(from, to, 1)
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn with(files: &[(&str, &str)]) -> Self {
        let folder = Folder(tempfile::tempdir().unwrap());
        for (name, text) in files {
            folder.write(name, text.as_bytes(), 0o640);
        }
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &[u8], mode: u32) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), Permissions::from_mode(mode)).unwrap();
    }

    fn mistakes(&self, name: &str) -> String {
        let path = self.path(name);
        let mistakes = if name.contains("agent") { parse::agent(&path).err() } else { parse::monitor(&path).err() };
        self.shown(&mistakes.unwrap_or_default())
    }

    fn shown(&self, mistakes: &[Mistake]) -> String {
        let folder = format!("{}/", self.0.path().display());
        mistakes.iter().map(|m| m.to_string().replace(&folder, "") + "\n").collect()
    }

    fn monitor(&self, name: &str) -> Monitor {
        parse::monitor(&self.path(name)).unwrap_or_else(|m| panic!("{}", self.shown(&m)))
    }

    fn agent(&self, name: &str) -> Agent {
        parse::agent(&self.path(name)).unwrap_or_else(|m| panic!("{}", self.shown(&m)))
    }
}

// What a good configuration becomes.

#[test]
fn the_monitors_configuration_with_its_defaults() {
    let folder = Folder::with(&[("mmm_mon.toml", MON), ("mmm_common.toml", COMMON)]);
    let monitor = folder.monitor("mmm_mon.toml");
    assert_eq!(monitor.ip.to_string(), "127.0.0.1");
    assert_eq!(monitor.port, 9988);
    assert_eq!(monitor.status_path, Path::new("/var/lib/mysql-mmm/mmm_mond.status"));
    assert_eq!(monitor.ping_ips.len(), 1);
    assert_eq!(monitor.ping_interval, Duration::from_secs(1));
    assert_eq!(monitor.mode, MonitorMode::Active);
    assert_eq!(monitor.wait_for_other_master, Duration::from_secs(120));
    assert!(monitor.careful_startup);
    assert_eq!(monitor.auto_set_online, Duration::ZERO);
    assert_eq!(monitor.flap_duration, Duration::from_secs(3600));
    assert_eq!(monitor.flap_count, 3);
    assert_eq!(monitor.kill_host_bin, None);
    assert_eq!(monitor.checks.keys().collect::<Vec<_>>(), CheckKind::ALL.iter().collect::<Vec<_>>());
    for check in monitor.checks.values() {
        assert_eq!(check.check_period, Duration::from_secs(1));
        assert_eq!(check.trap_period, Duration::from_secs(3));
        assert_eq!(check.timeout, Duration::from_secs(1));
        assert_eq!(check.restart_after, 10000);
        assert_eq!(check.max_backlog, Duration::from_secs(60));
    }
    let cluster = &monitor.cluster;
    assert_eq!(cluster.active_master_role, RoleName::from("writer"));
    assert_eq!(cluster.lease_ttl, Duration::from_secs(3));
    assert_eq!(cluster.heartbeat_interval, Duration::from_millis(500));
    assert!(!cluster.insecure_plaintext);
    assert_eq!(cluster.move_grace, Duration::from_secs(1));
    assert_eq!(cluster.move_timeout, Duration::from_secs(2));
    assert_eq!(cluster.drain_timeout, Duration::from_secs(30));
    assert_eq!(cluster.on_drain_timeout, OnDrainTimeout::Hold);
    assert_eq!(cluster.hang_timeout, Duration::from_secs(3));
    assert_eq!(cluster.restart_grace, Duration::ZERO);
    // What tests and tools start from is what the options' defaults make.
    let of = Cluster::of(cluster.hosts.clone(), cluster.roles.clone());
    assert_eq!(Cluster { insecure_plaintext: true, ..cluster.clone() }, of);
    assert_eq!(Monitor { ping_ips: vec![], cluster: of.clone(), ..monitor.clone() }, Monitor::of(of));
    let db1 = &cluster.hosts[&HostName::from("db1")];
    assert_eq!(db1.ip.to_string(), "127.0.0.31");
    assert_eq!(db1.mode, HostMode::Master);
    assert_eq!(db1.peer, Some(HostName::from("db2")));
    assert_eq!(db1.cluster_interface, "eth0");
    assert_eq!((db1.agent_port, db1.mysql_port), (9989, 3306));
    assert_eq!((db1.monitor_user.as_str(), db1.monitor_password.0.as_str()), ("mmm_monitor", "SeCrEt-monitor"));
    assert_eq!((db1.agent_user.as_str(), db1.agent_password.0.as_str()), ("", ""));
    assert_eq!((db1.replication_user.as_str(), db1.replication_password.0.as_str()), ("", ""));
    assert_eq!(cluster.hosts.len(), 3);
    let writer = &cluster.roles[&RoleName::from("writer")];
    assert_eq!(writer.mode, RoleMode::Exclusive);
    assert_eq!(writer.hosts, [HostName::from("db1"), HostName::from("db2")]);
    assert_eq!(writer.ips, ["192.168.0.50".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(writer.prefer, None);
    assert_eq!(cluster.roles.len(), 2);
}

#[test]
fn an_agents_configuration_with_its_defaults() {
    let folder = Folder::with(&[("mmm_agent.toml", AGENT), ("mmm_common.toml", COMMON)]);
    let agent = folder.agent("mmm_agent.toml");
    assert_eq!(agent.this, HostName::from("db1"));
    assert_eq!(agent.state_path, Path::new("/var/lib/mysql-mmm/mmm_agentd.state"));
    assert_eq!(agent.mysql_socket, None);
    assert_eq!(agent.watchdog_device, None);
    assert!(agent.exact_guard);
    assert_eq!(agent, Agent::of(agent.cluster.clone(), agent.this.clone()));
    for (name, host) in &agent.cluster.hosts {
        // No agent needs another host's login.
        let password = if *name == agent.this { "SeCrEt-agent" } else { "" };
        assert_eq!((host.agent_user.as_str(), host.agent_password.0.as_str()), ("mmm_agent", password));
        assert_eq!(host.replication_password.0, "SeCrEt-replication");
        assert_eq!((host.monitor_user.as_str(), host.monitor_password.0.as_str()), ("", ""));
    }
}

#[test]
fn every_option_is_taken_over() {
    let extra = r#"
        lease_ttl = "8s"
        heartbeat_interval = 0.25
        insecure_plaintext = true
        move_grace = 0
        move_timeout = "2500ms"
        drain_timeout = "1m"
        on_drain_timeout = "promote"
        hang_timeout = "4s"
        restart_grace = 5
        on_hang = "kill"
        semisync = false
        require_semisync = true
        semisync_slaves = true
        auto_reclone = true
        "#;
    let common =
        extra.to_owned() + &with(COMMON, "hosts = [\"db1\", \"db2\"]", "prefer = \"db1\"\nhosts = [\"db1\", \"db2\"]");
    let monitor = r#"[monitor]
        ip = "0.0.0.0"
        port = 9977
        status_path = "/tmp/status"
        ping_interval = 2
        mode = "wait"
        wait_for_other_master = "1m"
        careful_startup = false
        auto_set_online = 30
        flap_duration = "30m"
        flap_count = 5
        kill_host_bin = "/bin/sh"
        "#;
    let sections = r#"
        [check.default]
        check_period = "500ms"
        [check.mysql]
        trap_period = "4s"
        timeout = "700ms"
        restart_after = 7
        [check.rep_backlog]
        max_backlog = "10s"
        [host.db3]
        agent_port = 1
        mysql_port = 2
        "#;
    let mon = with(&with(MON, "[monitor]", monitor), "\"192.168.0.1\"", "\"192.168.0.1\", \"::1\"") + sections;
    let agent = AGENT.to_owned()
        + "[agent]\nstate_path = \"/tmp/state\"\nmysql_socket = \"/run/s\"\nwatchdog_device = \"/dev/w\"\nexact_guard = false\n\
            mysql_start_command = \"up\"\nmysql_stop_command = \"down\"\nmysql_pid_file = \"/run/p\"\ndatadir = \"/d\"\n";
    let folder = Folder::with(&[("mmm_mon.toml", &mon), ("mmm_common.toml", &common), ("mmm_agent.toml", &agent)]);

    let agent = folder.agent("mmm_agent.toml");
    assert_eq!(agent.state_path, Path::new("/tmp/state"));
    assert_eq!(agent.mysql_socket, Some(PathBuf::from("/run/s")));
    assert_eq!(agent.watchdog_device, Some(PathBuf::from("/dev/w")));
    assert!(!agent.exact_guard);
    let server = ServerControl {
        start_command: Some("up".into()),
        stop_command: Some("down".into()),
        pid_file: Some("/run/p".into()),
        datadir: Some("/d".into()),
    };
    assert_eq!(agent.server, server);

    let monitor = folder.monitor("mmm_mon.toml");
    let ms = Duration::from_millis;
    assert_eq!((monitor.ip.to_string().as_str(), monitor.port), ("0.0.0.0", 9977));
    assert_eq!(monitor.status_path, Path::new("/tmp/status"));
    assert_eq!(monitor.ping_ips.len(), 2);
    assert_eq!(monitor.ping_interval, ms(2000));
    assert_eq!(monitor.mode, MonitorMode::Wait);
    assert_eq!(monitor.wait_for_other_master, ms(60_000));
    assert!(!monitor.careful_startup);
    assert_eq!(monitor.auto_set_online, ms(30_000));
    assert_eq!(monitor.flap_duration, ms(1_800_000));
    assert_eq!(monitor.flap_count, 5);
    assert_eq!(monitor.kill_host_bin, Some(PathBuf::from("/bin/sh")));
    let mysql = &monitor.checks[&CheckKind::Mysql];
    assert_eq!((mysql.check_period, mysql.trap_period, mysql.timeout), (ms(500), ms(4000), ms(700)));
    assert_eq!(mysql.restart_after, 7);
    assert_eq!(monitor.checks[&CheckKind::RepBacklog].max_backlog, ms(10_000));
    assert_eq!(monitor.checks[&CheckKind::Ping].trap_period, ms(3000));
    let cluster = &monitor.cluster;
    assert_eq!((cluster.lease_ttl, cluster.heartbeat_interval), (ms(8000), ms(250)));
    assert!(cluster.insecure_plaintext);
    assert_eq!((cluster.move_grace, cluster.move_timeout, cluster.drain_timeout), (ms(0), ms(2500), ms(60_000)));
    assert_eq!(cluster.on_drain_timeout, OnDrainTimeout::Promote);
    assert_eq!((cluster.hang_timeout, cluster.restart_grace), (ms(4000), ms(5000)));
    assert_eq!(cluster.on_hang, OnHang::Kill);
    assert!(!cluster.semisync && cluster.require_semisync && cluster.semisync_slaves && cluster.auto_reclone);
    let db3 = &cluster.hosts[&HostName::from("db3")];
    assert_eq!((db3.agent_port, db3.mysql_port), (1, 2));
    assert_eq!(cluster.roles[&RoleName::from("writer")].prefer, Some(HostName::from("db1")));
}

#[test]
fn a_host_wins_over_the_default_and_a_later_file_over_an_earlier_one() {
    let common = with(COMMON, "cluster_interface", "agent_port = 1111\nmysql_port = 2222\ncluster_interface")
        + "[host.db4]\nip = \"127.0.0.34\"\nmode = \"slave\"\nagent_port = 4444\nmysql_port = 4445\n";
    let mon = MON.to_owned()
        + r#"agent_port = 7777
        [host.db3]
        agent_port = 3333
        [host.db4]
        mysql_port = 5555
        "#;
    let folder = Folder::with(&[("mmm_mon.toml", &mon), ("mmm_common.toml", &common)]);
    let hosts = folder.monitor("mmm_mon.toml").cluster.hosts;
    let ports: Vec<(u16, u16)> = hosts.values().map(|host| (host.agent_port, host.mysql_port)).collect();
    assert_eq!(ports, [(7777, 2222), (7777, 2222), (3333, 2222), (4444, 5555)]);
}

#[test]
fn included_files_are_found_beside_the_including_one_and_the_nearest_wins() {
    let folder =
        Folder::with(&[("mmm_mon.toml", &with(MON, "mmm_common.toml", "site/a.toml")), ("mmm_common.toml", COMMON)]);
    fs::create_dir(folder.path("site")).unwrap();
    folder.write(
        "site/a.toml",
        b"include = [\"../mmm_common.toml\", \"b.toml\"]\nlease_ttl = 7\nmove_timeout = 7",
        0o640,
    );
    folder.write(
        "site/b.toml",
        b"include = \"../mmm_common.toml\"\nlease_ttl = 9\ndrain_timeout = 9\nmove_timeout = 9",
        0o640,
    );
    let cluster = folder.monitor("mmm_mon.toml").cluster;
    let seconds = [cluster.lease_ttl, cluster.move_timeout, cluster.drain_timeout].map(|d| d.as_secs());
    assert_eq!(seconds, [7, 7, 9]);
}

#[test]
fn passwords_from_files() {
    let mon = with(MON, "monitor_password = \"SeCrEt-monitor\"", "monitor_password_file = \"monitor.pw\"");
    let common = with(COMMON, "agent_password = \"SeCrEt-agent\"", "agent_password_file = \"default.pw\"");
    let common = with(&common, "ip = \"127.0.0.31\"", "ip = \"127.0.0.31\"\nagent_password_file = \"db1.pw\"");
    let files = [("mmm_mon.toml", mon.as_str()), ("mmm_agent.toml", AGENT), ("mmm_common.toml", &common)];
    let folder = Folder::with(&files);
    folder.write("monitor.pw", b"from-file\n", 0o640);
    folder.write("db1.pw", b" with blanks \r\n", 0o600);

    let monitor = folder.monitor("mmm_mon.toml");
    assert!(monitor.cluster.hosts.values().all(|host| host.monitor_password.0 == "from-file"));

    // default.pw does not exist, but this agent does not log in to the other hosts' servers.
    let hosts = folder.agent("mmm_agent.toml").cluster.hosts;
    let passwords: Vec<&str> = hosts.values().map(|host| host.agent_password.0.as_str()).collect();
    assert_eq!(passwords, [" with blanks ", "", ""]);
}

#[test]
fn a_password_of_a_later_file_replaces_the_password_file_of_an_earlier_one() {
    let common = with(COMMON, "agent_password =", "monitor_password_file = \"missing.pw\"\nagent_password =");
    let folder = Folder::with(&[("mmm_mon.toml", MON), ("mmm_common.toml", &common)]);
    let hosts = folder.monitor("mmm_mon.toml").cluster.hosts;
    assert!(hosts.values().all(|host| host.monitor_password.0 == "SeCrEt-monitor"));
}

#[test]
fn the_monitor_reads_no_password_of_the_agents() {
    let common = with(COMMON, "agent_password = \"SeCrEt-agent\"", "agent_password_file = \"/nowhere/agent.pw\"");
    let common = with(&common, "replication_password = \"SeCrEt-replication\"\n", "");
    check(&[("mmm_mon.toml", MON), ("mmm_common.toml", &common)], "");
}

// lessons.md 28
#[test]
fn debug_output_shows_no_password() {
    let folder = Folder::with(&[("mmm_mon.toml", MON), ("mmm_agent.toml", AGENT), ("mmm_common.toml", COMMON)]);
    let monitor = folder.monitor("mmm_mon.toml");
    let agent = folder.agent("mmm_agent.toml");
    let shown = format!("{monitor:?} {monitor:#?} {agent:?} {agent:#?}");
    assert!(shown.contains("mmm_monitor") && shown.contains("***"), "{shown}");
    assert!(!shown.contains("SeCrEt"), "{shown}");
}

// The example files.

fn examples() -> [(&'static str, &'static str); 3] {
    [
        ("mmm_common.toml", include_str!("../../etc/mmm_common.toml")),
        ("mmm_mon.toml", include_str!("../../etc/mmm_mon.toml")),
        ("mmm_agent.toml", include_str!("../../etc/mmm_agent.toml")),
    ]
}

#[test]
fn the_example_files_can_be_used_as_they_are() {
    let folder = Folder::with(&examples());
    let monitor = folder.monitor("mmm_mon.toml");
    let agent = folder.agent("mmm_agent.toml");
    assert_eq!(monitor.cluster.hosts.len(), 3);
    assert_eq!(agent.cluster.roles, monitor.cluster.roles);
    // The common file alone names no monitor, but is complete for what it is.
    let common = folder.mistakes("mmm_common.toml");
    assert_eq!(common.lines().count(), 3, "{common}");
    assert!(common.contains("ping_ips is missing") && common.contains("monitor_user is missing"), "{common}");
}

/// `#name = value` says "this is the default", so writing it out must change nothing.
#[test]
fn the_documented_defaults_are_the_defaults() {
    let mut shown = 0;
    let written_out = examples().map(|(name, text)| {
        // The one example that is not at its default.
        let text = text.replace("#insecure_plaintext = false\n", "");
        let lines = text.lines().map(|line| match line.strip_prefix('#') {
            Some(option) if option.starts_with(|c: char| c.is_ascii_lowercase()) => {
                assert!(option.contains(" = "), "neither a default nor '# text': {line}");
                shown += 1;
                option
            }
            Some(_) | None => line,
        });
        (name, lines.collect::<Vec<_>>().join("\n"))
    });
    assert!(shown > 30, "only {shown} defaults found in the examples");
    let files: Vec<(&str, &str)> = written_out.iter().map(|(name, text)| (*name, text.as_str())).collect();
    let (plain, full) = (Folder::with(&examples()), Folder::with(&files));
    assert_eq!(plain.monitor("mmm_mon.toml"), full.monitor("mmm_mon.toml"));
    assert_eq!(plain.agent("mmm_agent.toml"), full.agent("mmm_agent.toml"));
}

// Files.

#[test]
fn the_file_is_not_there() {
    let folder = Folder::with(&[]);
    assert_eq!(
        folder.mistakes("mmm_mon.toml"),
        "mmm_mon.toml: cannot read mmm_mon.toml: No such file or directory (os error 2): create it, or name another \
         file with -c FILE\n"
    );
}

#[test]
fn an_included_file_is_not_there_and_the_other_mistakes_are_still_named() {
    check(
        &[("mmm_mon.toml", &with(MON, "ping_ips", "pings"))],
        r#"
        mmm_mon.toml:2: cannot read mmm_common.toml: No such file or directory (os error 2): create it or correct include
        mmm_mon.toml:5: unknown option 'pings' in [monitor]: known are ip, port, status_path, ping_ips, ping_interval, mode, wait_for_other_master, careful_startup, auto_set_online, flap_duration, flap_count, kill_host_bin"#,
    );
}

#[test]
fn a_syntax_error_is_one_mistake_and_the_other_files_are_still_looked_at() {
    let common = with(COMMON, "mode = \"slave\"", "mode = slave");
    check(
        &[("mmm_mon.toml", &with(MON, "ping_ips", "pings")), ("mmm_common.toml", &common)],
        r#"
        mmm_common.toml:23: syntax error: string values must be quoted, expected literal string
        mmm_mon.toml:5: unknown option 'pings' in [monitor]: known are ip, port, status_path, ping_ips, ping_interval, mode, wait_for_other_master, careful_startup, auto_set_online, flap_duration, flap_count, kill_host_bin"#,
    );
}

#[test]
fn a_password_without_quotes_is_not_repeated() {
    mon(
        "\"SeCrEt-monitor\"",
        "SeCrEt-monitor",
        r#"
        mmm_mon.toml:9: syntax error: string values must be quoted, expected literal string"#,
    );
}

#[test]
fn a_key_twice() {
    mon(
        "ping_ips",
        "port = 1\nport = 2\nping_ips",
        r#"
        mmm_mon.toml:6: syntax error: duplicate key"#,
    );
}

#[test]
fn a_file_of_mmm_2() {
    check(
        &[("mmm_mon.toml", MON), ("mmm_common.toml", "active_master_role writer\n<host default>\n")],
        r#"
        mmm_common.toml:1: syntax error: key with no value, expected `=` (this looks like a file of MMM 2.x: it has to be rewritten as TOML, with [host.db1] for <host db1>)"#,
    );
    check(
        &[("mmm_mon.toml", "include mmm_common.conf\n\n<monitor>\n")],
        r#"
        mmm_mon.toml:1: syntax error: key with no value, expected `=` (this looks like a file of MMM 2.x: it has to be rewritten as TOML, with [host.db1] for <host db1>)"#,
    );
}

#[test]
fn files_that_include_each_other() {
    let common = "include = [\"site.toml\"]\n".to_owned() + COMMON;
    let files =
        [("mmm_mon.toml", MON), ("mmm_common.toml", &common), ("site.toml", "\ninclude = [\"mmm_common.toml\"]")];
    let folder = Folder::with(&files);
    let real = |name| fs::canonicalize(folder.path(name)).unwrap().display().to_string();
    let circle = ["mmm_mon.toml", "mmm_common.toml", "site.toml", "mmm_common.toml"].map(real).join(" -> ");
    let folder_name = format!("{}/", folder.0.path().display());
    assert_eq!(
        folder.mistakes("mmm_mon.toml"),
        format!("site.toml:2: files include each other in a circle: {circle}\n").replace(&folder_name, "")
    );
}

#[test]
fn a_file_that_includes_itself() {
    let folder = Folder::with(&[("mmm_mon.toml", &with(MON, "mmm_common", "mmm_mon"))]);
    let found = folder.mistakes("mmm_mon.toml");
    assert!(found.starts_with("mmm_mon.toml:2: files include each other in a circle: "), "{found}");
    assert_eq!(found.lines().count(), 1, "{found}");
}

#[test]
fn files_that_include_each_other_without_end() {
    let names: Vec<String> = (0..40).map(|i| format!("f{i}_mon.toml")).collect();
    let texts: Vec<String> = (1..41).map(|i| format!("include = \"f{i}_mon.toml\"")).collect();
    let files: Vec<(&str, &str)> = names.iter().zip(&texts).map(|(n, t)| (n.as_str(), t.as_str())).collect();
    check(&files, "f15_mon.toml:1: files include each other more than 16 deep");
}

#[test]
fn include_is_no_name() {
    mon(
        "[\"mmm_common.toml\"]",
        "[\"mmm_common.toml\", 3]",
        r#"
        mmm_mon.toml:2: include entry is the name of a file in quotes, not 3"#,
    );
    mon(
        "[\"mmm_common.toml\"]",
        "true",
        r#"
        mmm_mon.toml:2: include is a list, such as ["mmm_common.toml"], not true"#,
    );
}

#[test]
fn what_is_no_text_and_what_is_no_file() {
    let folder = Folder::with(&[("mmm_mon.toml", &with(MON, "mmm_common.toml", "."))]);
    folder.write("latin_mon.toml", b"# fine\n# f\xfcr\n", 0o640);
    folder.write("big_mon.toml", &vec![b'#'; (1 << 20) + 1], 0o640);
    for (name, says) in [
        ("mmm_mon.toml", "mmm_mon.toml:2: cannot read .: it is not a file\n"),
        ("latin_mon.toml", "latin_mon.toml:2: this is not UTF-8 text: save the file as UTF-8\n"),
        (
            "big_mon.toml",
            "big_mon.toml: cannot read big_mon.toml: it is larger than 1 MiB, so it is no configuration\n",
        ),
    ] {
        assert_eq!(folder.mistakes(name), says);
    }
}

// lessons.md 28
#[test]
fn passwords_that_everybody_can_read() {
    let folder = Folder::with(&[("mmm_mon.toml", MON), ("mmm_common.toml", COMMON)]);
    let set = |name: &str, mode| fs::set_permissions(folder.path(name), Permissions::from_mode(mode)).unwrap();
    set("mmm_common.toml", 0o644);
    assert_eq!(
        folder.mistakes("mmm_mon.toml"),
        "mmm_common.toml:7: this file holds passwords and is open to everybody (mode 0644): chmod o= mmm_common.toml, or \
         move them to files of their own (agent_password_file and the like)\n"
    );
    set("mmm_common.toml", 0o660);
    assert_eq!(folder.mistakes("mmm_mon.toml"), "");
}

#[test]
fn without_passwords_a_file_may_be_read_but_not_written_by_everybody() {
    let common = "insecure_plaintext = false\n";
    let folder =
        Folder::with(&[("mmm_mon.toml", &with(MON, "[\"mmm", "[\"site.toml\", \"mmm")), ("mmm_common.toml", COMMON)]);
    folder.write("site.toml", common.as_bytes(), 0o644);
    assert_eq!(folder.mistakes("mmm_mon.toml"), "");
    folder.write("site.toml", common.as_bytes(), 0o646);
    assert_eq!(
        folder.mistakes("mmm_mon.toml"),
        "site.toml: everybody can write to this file (mode 0646): chmod o-w site.toml\n"
    );
}

#[test]
fn a_password_file_that_cannot_be_used() {
    let mon = with(MON, "monitor_password = \"SeCrEt-monitor\"", "monitor_password_file = \"monitor.pw\"");
    let folder = Folder::with(&[("mmm_mon.toml", &mon), ("mmm_common.toml", COMMON)]);
    let says = |text: &str| format!("mmm_mon.toml:9: monitor_password_file: {text}\n");
    assert_eq!(folder.mistakes("mmm_mon.toml"), says("cannot read monitor.pw: No such file or directory (os error 2)"));
    for (text, mode, expected) in [
        ("SeCrEt\n", 0o644, "monitor.pw holds a password and is open to everybody (mode 0644): chmod o= monitor.pw"),
        ("\n", 0o600, "monitor.pw is empty: write the password into its only line"),
        ("SeCrEt\nmore", 0o600, "monitor.pw has more than one line: it may hold the password only"),
    ] {
        folder.write("monitor.pw", text.as_bytes(), mode);
        assert_eq!(folder.mistakes("mmm_mon.toml"), says(expected));
    }
}

#[test]
fn a_password_and_its_file() {
    mon(
        "monitor_user",
        "monitor_password_file = \"x\"\nmonitor_user",
        r#"
        mmm_mon.toml:8: [host.default] has both monitor_password and monitor_password_file: leave one of them out
        mmm_mon.toml:8: monitor_password_file: cannot read x: No such file or directory (os error 2)"#,
    );
}

#[test]
fn an_empty_password() {
    mon(
        "SeCrEt-monitor",
        "",
        r#"
        mmm_mon.toml:9: monitor_password is empty: give the account a password"#,
    );
    let common = with(&with(COMMON, "SeCrEt-agent", ""), "SeCrEt-replication", "");
    check(
        &[("mmm_agent.toml", AGENT), ("mmm_common.toml", &common)],
        r#"
        mmm_common.toml:9: replication_password is empty: give the account a password"#,
    );
}

// Single options.

#[test]
fn an_unknown_option_with_a_suggestion() {
    mon(
        "[host.default]",
        "[check.default]\ntrap_perod = \"3s\"\n[host.default]",
        r#"
        mmm_mon.toml:8: unknown option 'trap_perod' in [check.default]: did you mean 'trap_period'?"#,
    );
    common(
        "cluster_interface",
        "Cluster-Interface = \"eth0\"\ncluster_interface",
        r#"
        mmm_common.toml:5: unknown option 'Cluster-Interface' in [host.default]: did you mean 'cluster_interface'?"#,
    );
    common(
        "active_master_role",
        "active_master_rol = \"writer\"\nactive_master_role",
        r#"
        mmm_common.toml:2: unknown option 'active_master_rol' at the top of a file: did you mean 'active_master_role'?"#,
    );
    mon(
        "[monitor]",
        "[montior]\n[monitor]",
        r#"
        mmm_mon.toml:4: unknown option 'montior' at the top of a file: did you mean 'monitor'?"#,
    );
}

#[test]
fn an_unknown_option_that_is_like_nothing() {
    common(
        "mode = \"balanced\"",
        "mode = \"balanced\"\ncolour = \"blue\"",
        r#"
        mmm_common.toml:32: unknown option 'colour' in [role.reader]: known are mode, hosts, ips, prefer"#,
    );
}

#[test]
fn an_option_in_the_wrong_section() {
    mon(
        "ping_ips",
        "lease_ttl = 3\nping_ips",
        r#"
        mmm_mon.toml:5: 'lease_ttl' is no option in [monitor]: it belongs at the top of the file, before the first [section]"#,
    );
    common(
        "active_master_role",
        "cluster_interface = \"eth0\"\nactive_master_role",
        r#"
        mmm_common.toml:2: 'cluster_interface' is no option at the top of a file: it belongs in [host.default] or [host.NAME]"#,
    );
    common(
        "ip = \"127.0.0.33\"",
        "ip = \"127.0.0.33\"\nmax_backlog = 3",
        r#"
        mmm_common.toml:23: 'max_backlog' is no option in [host.db3]: it belongs in [check.default] or [check.NAME]"#,
    );
    mon(
        "ping_ips",
        "prefer = \"db1\"\nping_ips",
        r#"
        mmm_mon.toml:5: 'prefer' is no option in [monitor]: it belongs in [role.NAME]"#,
    );
}

#[test]
fn what_mmm_2_knew_and_what_replaced_it() {
    let common = "debug = 1\nmax_kill_retries = 10\ndefault_copy_method = \"scp\"\n".to_owned()
        + COMMON
        + r#"
        [socket]
        type = "ssl"
        [copy_method.scp]
        "#;
    let common = with(
        &common,
        "[host.default]",
        r#"[host.default]
        pid_path = "/run/x"
        bin_path = "/usr/lib"
        mysql_pidfile = "x"
        mysql_rcscript = "x"
        mysql_cnf = "x"
        ssh_user = "x"
        tools_password = "SeCrEt-tools"
        lvm_mount_dir = "x"
        backup_dir = "x"
        auto_increment_offset = 1"#,
    );
    check(
        &[("mmm_mon.toml", &with(MON, "ping_ips", "pid_path = \"x\"\nping_ips")), ("mmm_common.toml", &common)],
        r#"
        mmm_common.toml:1: 'debug' of MMM means nothing here any more: logging is set by the environment (RUST_LOG=debug in the service's unit): leave it out
        mmm_common.toml:2: 'max_kill_retries' of MMM means nothing here any more: the sessions of the old writer are killed until none is left or move_timeout has passed: see move_timeout
        mmm_common.toml:3: 'default_copy_method' of MMM means nothing here any more: the backup and clone tools of MMM 2.x are not part of this version: leave it out
        mmm_common.toml:8: 'pid_path' of MMM means nothing here any more: the daemons stay in the foreground and systemd knows their process: leave it out
        mmm_common.toml:9: 'bin_path' of MMM means nothing here any more: the checks and the agent's helpers are built into the daemons: leave it out
        mmm_common.toml:10: 'mysql_pidfile' of MMM means nothing here any more: it is now called mysql_pid_file, in [agent] of mmm_agent.toml
        mmm_common.toml:11: 'mysql_rcscript' of MMM means nothing here any more: it is now mysql_start_command and mysql_stop_command, in [agent] of mmm_agent.toml
        mmm_common.toml:12: 'mysql_cnf' of MMM means nothing here any more: the server's own configuration file is not read: leave it out
        mmm_common.toml:13: 'ssh_user' of MMM means nothing here any more: the backup and clone tools of MMM 2.x are not part of this version: leave it out
        mmm_common.toml:14: 'tools_password' of MMM means nothing here any more: the backup and clone tools of MMM 2.x are not part of this version: leave it out
        mmm_common.toml:15: 'lvm_mount_dir' of MMM means nothing here any more: the backup and clone tools of MMM 2.x are not part of this version: leave it out
        mmm_common.toml:16: 'backup_dir' of MMM means nothing here any more: the backup and clone tools of MMM 2.x are not part of this version: leave it out
        mmm_common.toml:17: 'auto_increment_offset' of MMM means nothing here any more: it is set in the configuration of the database server (my.cnf) of each master
        mmm_common.toml:48: 'socket' of MMM means nothing here any more: there is no TLS in this version yet: leave it out, and see insecure_plaintext (later: [tls])
        mmm_common.toml:50: 'copy_method' of MMM means nothing here any more: the backup and clone tools of MMM 2.x are not part of this version: leave it out
        mmm_mon.toml:5: 'pid_path' of MMM means nothing here any more: the daemons stay in the foreground and systemd knows their process: leave it out"#,
    );
}

#[test]
fn tls_is_not_there_yet() {
    mon(
        "[monitor]",
        "[tls]\nca_file = \"x\"\n[monitor]",
        r#"
        mmm_mon.toml:4: TLS is not in this version yet: leave [tls] out, and see insecure_plaintext for daemons that listen beyond loopback"#,
    );
}

#[test]
fn a_section_without_its_name_or_a_name_without_its_section() {
    common(
        "[host.db3]\n",
        "[host]\n",
        r#"
        mmm_common.toml:22: 'ip' stands in [host] itself: it belongs in a section with a name, [host.default] or [host.NAME]
        mmm_common.toml:23: 'mode' stands in [host] itself: it belongs in a section with a name, [host.default] or [host.NAME]
        mmm_common.toml:32: role 'reader' names host 'db3', which does not exist: known are db1, db2"#,
    );
    check(
        &[("mmm_mon.toml", &("monitor = 3\n".to_owned() + &MON.replace("[monitor]", ""))), ("mmm_common.toml", COMMON)],
        r#"
        mmm_mon.toml: ping_ips is missing in [monitor]: add ping_ips = ["192.168.0.1"] (addresses that always answer, as the gateway's)
        mmm_mon.toml:1: 'monitor' is a section: write [monitor] on a line of its own
        mmm_mon.toml:6: 'ping_ips' is no option at the top of a file: it belongs in [monitor]"#,
    );
    check(
        &[("mmm_mon.toml", &("host = 3\n".to_owned() + MON)), ("mmm_common.toml", "")],
        r#"
        mmm_mon.toml:8: syntax error: cannot extend value of type integer with a dotted key"#,
    );
}

#[test]
fn names_that_cannot_be() {
    common(
        "[host.db3]",
        "[host.\"db 3\"]",
        r#"
        mmm_common.toml:21: "db 3" cannot be the name of a host: use letters, digits, - and _
        mmm_common.toml:32: role 'reader' names host 'db3', which does not exist: known are db 3, db1, db2"#,
    );
    common(
        "[host.db3]",
        "[host.all]",
        r#"
        mmm_common.toml:21: a host cannot be called 'all': mmm_control means every host by it
        mmm_common.toml:32: role 'reader' names host 'db3', which does not exist: known are all, db1, db2"#,
    );
    common(
        "[role.reader]",
        "[role.default]",
        r#"
        mmm_common.toml:30: a role cannot be called 'default': roles have no defaults, give each its own values"#,
    );
    mon(
        "[monitor]",
        "[check.rep_treads]\n[monitor]",
        r#"
        mmm_mon.toml:4: there is no check 'rep_treads': did you mean 'rep_threads'?"#,
    );
}

#[test]
fn max_backlog_of_another_check() {
    mon(
        "[monitor]",
        "[check.ping]\nmax_backlog = 3\n[monitor]",
        r#"
        mmm_mon.toml:5: max_backlog belongs in [check.rep_backlog]: [check.ping] does not look at the backlog"#,
    );
}

#[test]
fn values_of_the_wrong_kind() {
    common(
        "mode = \"slave\"",
        "mode = \"salve\"",
        r#"
        mmm_common.toml:23: mode is "master" or "slave", not "salve": did you mean 'slave'?"#,
    );
    common(
        "mode = \"slave\"",
        "mode = \"replica\"",
        r#"
        mmm_common.toml:23: mode is "master" or "slave", not "replica""#,
    );
    common(
        "mode = \"balanced\"",
        "mode = true",
        r#"
        mmm_common.toml:31: mode is "exclusive" or "balanced", not true"#,
    );
    common(
        "\"127.0.0.33\"",
        "\"db3.example.com\"",
        r#"
        mmm_common.toml:22: ip is an IP address (no name, no port), such as "192.168.0.31", not "db3.example.com""#,
    );
    common(
        "[\"192.168.0.50\"]",
        "\"192.168.0.50\"",
        r#"
        mmm_common.toml:28: ips is a list: write ["192.168.0.50"]"#,
    );
    common(
        "[\"db1\", \"db2\", \"db3\"]",
        "\"db1, db2,db3\"",
        r#"
        mmm_common.toml:32: hosts is a list: write ["db1", "db2", "db3"]"#,
    );
    common(
        "\"192.168.0.51\", \"192.168.0.52\"",
        "\n\"192.168.0.51/24\",\n\"192.168.0.520\"",
        r#"
        mmm_common.toml:34: ips entry has no prefix length (addresses are /32 or /128): write "192.168.0.51"
        mmm_common.toml:35: ips entry is an IP address (no name, no port), such as "192.168.0.31", not "192.168.0.520""#,
    );
    common(
        "\"eth0\"",
        "\"eth0:1\"",
        r#"
        mmm_common.toml:5: cluster_interface is an interface, not a label of one: write "eth0" instead of "eth0:1""#,
    );
    common(
        "\"eth0\"",
        "\"an interface\"",
        r#"
        mmm_common.toml:5: cluster_interface is the name of a network interface (at most 15 letters), such as "eth0", not "an interface""#,
    );
    common(
        "active_master_role",
        "lease_ttl = \"3 weeks\"\nactive_master_role",
        r#"
        mmm_common.toml:2: lease_ttl is a duration such as "500ms", "3s", "2m" or "1h" (a bare number means seconds), not "3 weeks""#,
    );
    common(
        "active_master_role",
        "on_drain_timeout = \"wait\"\nactive_master_role",
        r#"
        mmm_common.toml:2: on_drain_timeout is "hold" or "promote", not "wait""#,
    );
    common(
        "active_master_role",
        "insecure_plaintext = \"yes\"\nactive_master_role",
        r#"
        mmm_common.toml:2: insecure_plaintext is true or false (without quotes), not "yes""#,
    );
    mon(
        "ping_ips",
        "port = 70000\nping_ips",
        r#"
        mmm_mon.toml:5: port is a port, 1 to 65535 (without quotes), not 70000"#,
    );
    mon(
        "ping_ips",
        "flap_count = 0\nping_ips",
        r#"
        mmm_mon.toml:5: flap_count is a whole number from 1 on (without quotes), not 0"#,
    );
    mon(
        "ping_ips",
        "status_path = \"mmm.status\"\nping_ips",
        r#"
        mmm_mon.toml:5: status_path is a file's whole path, from / on, not "mmm.status""#,
    );
    mon(
        "ping_ips",
        "mode = \"ACTIVE\"\nping_ips",
        r#"
        mmm_mon.toml:5: mode is "active" or "manual" or "wait" or "passive", not "ACTIVE": did you mean 'active'?"#,
    );
    mon(
        "\"SeCrEt-monitor\"",
        "[\"SeCrEt-monitor\"]",
        r#"
        mmm_mon.toml:9: monitor_password is text in quotes, not a list"#,
    );
    agent(
        "this",
        "this = \"\" #",
        r#"
        mmm_agent.toml:3: this is the name of a host, such as "db1", not """#,
    );
}

#[test]
fn a_kill_host_bin_that_cannot_be_called() {
    mon(
        "ping_ips",
        "kill_host_bin = \"/nowhere/kill_host\"\nping_ips",
        r#"
        mmm_mon.toml:5: kill_host_bin /nowhere/kill_host cannot be looked at (No such file or directory (os error 2)): correct the name, or leave the option out"#,
    );
    mon(
        "ping_ips",
        "kill_host_bin = \"/etc/passwd\"\nping_ips",
        r#"
        mmm_mon.toml:5: kill_host_bin /etc/passwd is not an executable file: chmod +x, or correct the name"#,
    );
    mon(
        "ping_ips",
        "kill_host_bin = \"kill_host\"\nping_ips",
        r#"
        mmm_mon.toml:5: kill_host_bin is a file's whole path, from / on, not "kill_host""#,
    );
}

// What is missing.

#[test]
fn options_without_which_it_does_not_work() {
    common(
        "ip = \"127.0.0.33\"\nmode = \"slave\"",
        "",
        r#"
        mmm_common.toml:21: ip is missing in [host.db3]: add ip = "192.168.0.31"
        mmm_common.toml:21: mode is missing in [host.db3]: add mode = "master" or mode = "slave""#,
    );
    common(
        "mode = \"balanced\"\nhosts = [\"db1\", \"db2\", \"db3\"]\nips = [\"192.168.0.51\", \"192.168.0.52\"]",
        "",
        r#"
        mmm_common.toml:30: hosts is missing in [role.reader]: add hosts = ["db1", "db2"]
        mmm_common.toml:30: ips is missing in [role.reader]: add ips = ["192.168.0.50"]
        mmm_common.toml:30: mode is missing in [role.reader]: add mode = "exclusive" or mode = "balanced""#,
    );
    mon(
        "ping_ips = [\"192.168.0.1\"]",
        "",
        r#"
        mmm_mon.toml:4: ping_ips is missing in [monitor]: add ping_ips = ["192.168.0.1"] (addresses that always answer, as the gateway's)"#,
    );
    mon(
        "[monitor]\nping_ips = [\"192.168.0.1\"]",
        "",
        r#"
        mmm_mon.toml: ping_ips is missing in [monitor]: add ping_ips = ["192.168.0.1"] (addresses that always answer, as the gateway's)"#,
    );
    agent(
        "this = \"db1\"",
        "",
        r#"
        mmm_agent.toml: this is missing at the top: add this = "db1" (the name of this host)"#,
    );
}

#[test]
fn what_no_host_has_is_said_once() {
    mon(
        "monitor_user = \"mmm_monitor\"\nmonitor_password = \"SeCrEt-monitor\"",
        "",
        r#"
        mmm_common.toml:4: monitor_password (or monitor_password_file) is missing for every host: give it in [host.default]
        mmm_common.toml:4: monitor_user is missing for every host: give it in [host.default]"#,
    );
    let logins = &COMMON[COMMON.find("agent_user").unwrap()..COMMON.find("[host.db1]").unwrap()];
    let common = with(COMMON, logins, "");
    check(
        &[("mmm_agent.toml", AGENT), ("mmm_common.toml", &common)],
        r#"
        mmm_common.toml:4: agent_password (or agent_password_file) is missing for every host: give it in [host.default]
        mmm_common.toml:4: agent_user is missing for every host: give it in [host.default]
        mmm_common.toml:4: replication_password (or replication_password_file) is missing for every host: give it in [host.default]
        mmm_common.toml:4: replication_user is missing for every host: give it in [host.default]"#,
    );
    let common = with(&with(&common, "[host.default]", ""), "cluster_interface = \"eth0\"", "");
    let common = with(&common, "[host.db2]", &format!("cluster_interface = \"eth1\"\n{logins}\n[host.db2]"));
    check(
        &[("mmm_agent.toml", AGENT), ("mmm_common.toml", &common)],
        r#"
        mmm_common.toml:18: agent_password (or agent_password_file) is missing in [host.db2]: add it
        mmm_common.toml:18: agent_user is missing in [host.db2]: add it
        mmm_common.toml:18: cluster_interface is missing in [host.db2]: add cluster_interface = "eth0"
        mmm_common.toml:18: replication_password (or replication_password_file) is missing in [host.db2]: add it
        mmm_common.toml:18: replication_user is missing in [host.db2]: add it
        mmm_common.toml:23: agent_password (or agent_password_file) is missing in [host.db3]: add it
        mmm_common.toml:23: agent_user is missing in [host.db3]: add it
        mmm_common.toml:23: cluster_interface is missing in [host.db3]: add cluster_interface = "eth0"
        mmm_common.toml:23: replication_password (or replication_password_file) is missing in [host.db3]: add it
        mmm_common.toml:23: replication_user is missing in [host.db3]: add it"#,
    );
}

#[test]
fn no_include_at_all() {
    check(
        &[("mmm_mon.toml", &with(MON, "include = [\"mmm_common.toml\"]", ""))],
        r#"
        mmm_mon.toml: there are no hosts: name each in a [host.NAME], usually in mmm_common.toml, and include that file"#,
    );
    check(
        &[("mmm_mon.toml", "")],
        r#"
        mmm_mon.toml: ping_ips is missing in [monitor]: add ping_ips = ["192.168.0.1"] (addresses that always answer, as the gateway's)
        mmm_mon.toml: there are no hosts: name each in a [host.NAME], usually in mmm_common.toml, and include that file"#,
    );
}

// Mistakes between options.

#[test]
fn a_role_with_an_unknown_host() {
    common(
        "[\"db1\", \"db2\", \"db3\"]",
        "[\"db1\", \"dbb2\", \"nobody\"]",
        r#"
        mmm_common.toml:32: role 'reader' names host 'dbb2', which does not exist: known are db1, db2, db3
        mmm_common.toml:32: role 'reader' names host 'nobody', which does not exist: known are db1, db2, db3"#,
    );
}

#[test]
fn a_role_with_a_host_twice() {
    common(
        "[\"db1\", \"db2\", \"db3\"]",
        "[\"db1\", \"db2\", \"db1\"]",
        r#"
        mmm_common.toml:32: role 'reader' names host 'db1' twice"#,
    );
}

#[test]
fn a_role_with_nothing_in_it() {
    common(
        "[\"db1\", \"db2\", \"db3\"]",
        "[]",
        r#"
        mmm_common.toml:32: role 'reader' has no hosts, so nobody could hold it: name some, or leave the role out"#,
    );
    common(
        "[\"192.168.0.51\", \"192.168.0.52\"]",
        "[]",
        r#"
        mmm_common.toml:33: role 'reader' has no ips: name its addresses, or leave the role out"#,
    );
    common(
        "[\"192.168.0.50\"]",
        "[]",
        r#"
        mmm_common.toml:28: role 'writer' has no ips: name its addresses, or leave the role out"#,
    );
}

#[test]
fn an_exclusive_role_with_several_addresses() {
    common(
        "[\"192.168.0.50\"]",
        "[\"192.168.0.50\", \"192.168.0.49\"]",
        r#"
        mmm_common.toml:28: role 'writer' is exclusive and has 2 ips: it has exactly one, or is balanced"#,
    );
}

#[test]
fn one_address_with_two_meanings() {
    common(
        "[\"192.168.0.51\", \"192.168.0.52\"]",
        "[\"192.168.0.51\", \"192.168.0.51\"]",
        r#"
        mmm_common.toml:33: role 'reader' names the address 192.168.0.51 twice"#,
    );
    common(
        "[\"192.168.0.51\", \"192.168.0.52\"]",
        "[\"192.168.0.51\", \"192.168.0.50\"]",
        r#"
        mmm_common.toml:28: the address 192.168.0.50 belongs to role 'reader' and to role 'writer': only one can have it"#,
    );
    common(
        "[\"192.168.0.51\", \"192.168.0.52\"]",
        "[\"192.168.0.51\", \"127.0.0.33\"]",
        r#"
        mmm_common.toml:33: role 'reader' names 127.0.0.33, which is the own ip of host 'db3': role addresses move, so they must be others"#,
    );
    mon(
        "[monitor]",
        "[monitor]\nip = \"192.168.0.51\"",
        r#"
        mmm_mon.toml:5: mmm_mond would listen on 192.168.0.51 (monitor.ip) without TLS, and whoever reaches that port could move roles: there is no TLS in this version yet, so keep the port inside a trusted network and say insecure_plaintext = true, or use a loopback address
        mmm_mon.toml:5: the monitor's ip 192.168.0.51 is an address of role 'reader', which moves: give it one of its own"#,
    );
    mon(
        "192.168.0.1\"",
        "192.168.0.51\"",
        r#"
        mmm_mon.toml:5: ping_ips holds 192.168.0.51, an address of role 'reader', which moves: name fixed addresses only"#,
    );
}

#[test]
fn two_hosts_with_one_address() {
    common(
        "127.0.0.32",
        "127.0.0.31",
        r#"
        mmm_common.toml:17: 'db1' and 'db2' have the same ip 127.0.0.31 and the same agent_port 9989: correct one ip, or give them different ports
        mmm_common.toml:17: 'db1' and 'db2' have the same ip 127.0.0.31 and the same mysql_port 3306: correct one ip, or give them different ports"#,
    );
    let one_port = with(COMMON, "\"127.0.0.32\"", "\"127.0.0.31\"\nagent_port = 9990");
    check(
        &[("mmm_mon.toml", MON), ("mmm_common.toml", &one_port)],
        r#"
        mmm_common.toml:17: 'db1' and 'db2' have the same ip 127.0.0.31 and the same mysql_port 3306: correct one ip, or give them different ports"#,
    );
    let both_ports = with(&one_port, "9990", "9990\nmysql_port = 3307");
    check(&[("mmm_mon.toml", MON), ("mmm_common.toml", &both_ports)], "");
}

#[test]
fn ports_that_collide() {
    common(
        "\"127.0.0.33\"",
        "\"127.0.0.33\"\nagent_port = 3306",
        r#"
        mmm_common.toml:23: 'db3' has the same agent_port and mysql_port 3306: change one"#,
    );
    mon(
        "[monitor]",
        "[monitor]\nip = \"127.0.0.31\"\nport = 9989",
        r#"
        mmm_mon.toml:6: the monitor's port 9989 is also the agent_port of 'db1' on the same ip: change one"#,
    );
}

#[test]
fn peers_that_do_not_fit() {
    common(
        "peer = \"db2\"",
        "",
        r#"
        mmm_common.toml:13: 'db1' is a master without a peer: name the other master, as in peer = "db2""#,
    );
    common(
        "peer = \"db2\"",
        "peer = \"db1\"",
        r#"
        mmm_common.toml:14: 'db1' is its own peer: name the other master"#,
    );
    common(
        "peer = \"db2\"",
        "peer = \"db22\"",
        r#"
        mmm_common.toml:14: the peer of 'db1' is 'db22', which is not a host: known are db1, db2, db3"#,
    );
    common(
        "peer = \"db2\"",
        "peer = \"db3\"",
        r#"
        mmm_common.toml:14: the peer of 'db1' is 'db3', which is a slave: a peer is the other master"#,
    );
    common(
        "mode = \"slave\"",
        "mode = \"slave\"\npeer = \"db1\"",
        r#"
        mmm_common.toml:24: 'db3' is a slave and has no peer: leave peer = "db1" out, or make it a master"#,
    );
    common(
        "mode = \"slave\"",
        "mode = \"master\"\npeer = \"db1\"",
        r#"
        mmm_common.toml:24: 'db3' names 'db1' as its peer, but 'db1' names 'db2': masters go in pairs"#,
    );
}

#[test]
fn two_pairs_of_masters_are_fine() {
    let common = with(COMMON, "mode = \"slave\"", "mode = \"master\"\npeer = \"db4\"")
        + "[host.db4]\nip = \"127.0.0.34\"\nmode = \"master\"\npeer = \"db3\"\n";
    check(&[("mmm_mon.toml", MON), ("mmm_common.toml", &common)], "");
}

#[test]
fn preferences_that_do_not_fit() {
    common(
        "[\"192.168.0.50\"]",
        "[\"192.168.0.50\"]\nprefer = \"db3\"",
        r#"
        mmm_common.toml:29: role 'writer' prefers 'db3', which is not one of its hosts: known are db1, db2"#,
    );
    common(
        "mode = \"balanced\"",
        "mode = \"balanced\"\nprefer = \"db3\"",
        r#"
        mmm_common.toml:32: role 'reader' is balanced, so it can prefer no host: leave prefer = "db3" out"#,
    );
}

#[test]
fn an_active_master_role_that_cannot_be() {
    common(
        "\"writer\"",
        "\"wirter\"",
        r#"
        mmm_common.toml:2: active_master_role is 'wirter', but there is no [role.wirter]: known are reader, writer"#,
    );
    common(
        "active_master_role = \"writer\"\n",
        "active_master_role = \"reader\"\n",
        r#"
        mmm_common.toml:31: role 'reader' is the active_master_role, so it has one writer: make it mode = "exclusive"
        mmm_common.toml:32: 'db3' is a slave and cannot hold the active_master_role 'reader': take it out of hosts, or make it a master with a peer"#,
    );
    common(
        "[role.writer]",
        "[role.Writer2]",
        r#"
        mmm_common.toml:2: active_master_role is 'writer', but there is no [role.writer]: known are Writer2, reader"#,
    );
    common(
        "[\"db1\", \"db2\"]",
        "[\"db1\", \"db3\"]",
        r#"
        mmm_common.toml:27: 'db3' is a slave and cannot hold the active_master_role 'writer': take it out of hosts, or make it a master with a peer"#,
    );
}

#[test]
fn leases_that_are_too_short() {
    common(
        "active_master_role",
        "lease_ttl = \"200ms\"\nheartbeat_interval = \"50ms\"\nactive_master_role",
        r#"
        mmm_common.toml:2: lease_ttl is 200ms, and the margin that is waited out besides it 200 ms: less than 300ms gains nothing, and a healthy host would lose its roles by a hiccup of the network"#,
    );
    let short = "lease_ttl = \"300ms\"\nheartbeat_interval = \"50ms\"\nactive_master_role";
    common("active_master_role", short, "");
    let cluster = with(COMMON, "active_master_role", short);
    check(
        &[("mmm_agent.toml", &(AGENT.to_owned() + "[agent]\nexact_guard = false\n")), ("mmm_common.toml", &cluster)],
        r#"
        mmm_agent.toml:5: lease_ttl is 300ms, which needs the exact guard, and exact_guard is false: without it the kernel may remove an address up to 1 s late. Turn it on, or make lease_ttl 3s or longer"#,
    );
    common(
        "active_master_role",
        "heartbeat_interval = \"1s\"\nactive_master_role",
        r#"
        mmm_common.toml:2: lease_ttl is 3s and heartbeat_interval 1s: a few lost messages would take a healthy host's roles away; make lease_ttl at least 4 times heartbeat_interval"#,
    );
    common("active_master_role", "lease_ttl = \"4s\"\nheartbeat_interval = \"1s\"\nactive_master_role", "");
}

#[test]
fn checks_that_fail_by_themselves() {
    mon(
        "[monitor]",
        "[check.default]\ncheck_period = \"5s\"\n[monitor]",
        r#"
        mmm_mon.toml:5: trap_period 3s is shorter than check_period 5s: a single late answer would count as a failure; make trap_period at least as long, better three times that"#,
    );
    mon(
        "[monitor]",
        "[check.ping]\ntimeout = \"4s\"\n[monitor]",
        r#"
        mmm_mon.toml:5: trap_period 3s is shorter than timeout 4s: a single late answer would count as a failure; make trap_period at least as long, better three times that"#,
    );
}

#[test]
fn times_that_cannot_be_zero() {
    let zeros = "lease_ttl = 0\nheartbeat_interval = 0\nmove_timeout = 0\ndrain_timeout = 0\nhang_timeout = 0\n";
    let mon = with(
        MON,
        "[monitor]",
        "[check.default]\ncheck_period = 0\ntrap_period = 0\ntimeout = 0\n[monitor]\nping_interval = 0\nflap_duration = 0",
    );
    check(
        &[("mmm_mon.toml", &mon), ("mmm_common.toml", &(zeros.to_owned() + COMMON))],
        r#"
        mmm_common.toml:1: lease_ttl is 0, and the margin that is waited out besides it 200 ms: less than 300ms gains nothing, and a healthy host would lose its roles by a hiccup of the network
        mmm_common.toml:2: heartbeat_interval cannot be 0: give it a time such as "1s"
        mmm_common.toml:3: move_timeout cannot be 0: give it a time such as "1s"
        mmm_common.toml:4: drain_timeout cannot be 0: give it a time such as "1s"
        mmm_common.toml:5: hang_timeout cannot be 0: give it a time such as "1s"
        mmm_mon.toml:5: check_period cannot be 0: give it a time such as "1s"
        mmm_mon.toml:6: trap_period cannot be 0: give it a time such as "1s"
        mmm_mon.toml:7: timeout cannot be 0: give it a time such as "1s"
        mmm_mon.toml:9: ping_interval cannot be 0: give it a time such as "1s"
        mmm_mon.toml:10: flap_duration cannot be 0: give it a time such as "1s""#,
    );
}

#[test]
fn no_network_check() {
    mon(
        "[\"192.168.0.1\"]",
        "[]",
        r#"
        mmm_mon.toml:5: ping_ips is empty, so the monitor could never tell a dead host from its own dead network: name addresses that always answer, such as the gateway's"#,
    );
}

#[test]
fn an_agent_of_no_host() {
    agent(
        "\"db1\"",
        "\"bd1\"",
        r#"
        mmm_agent.toml:3: this = "bd1" is not a host of the cluster: known are db1, db2, db3"#,
    );
}

// lessons.md 8
#[test]
fn plaintext_beyond_loopback() {
    mon(
        "[monitor]",
        "[monitor]\nip = \"192.168.0.10\"",
        r#"
        mmm_mon.toml:5: mmm_mond would listen on 192.168.0.10 (monitor.ip) without TLS, and whoever reaches that port could move roles: there is no TLS in this version yet, so keep the port inside a trusted network and say insecure_plaintext = true, or use a loopback address"#,
    );
    let common = with(COMMON, "127.0.0.31", "192.168.0.31");
    check(
        &[("mmm_agent.toml", AGENT), ("mmm_common.toml", &common)],
        r#"
        mmm_common.toml:12: mmm_agentd would listen on 192.168.0.31 (the ip of 'db1') without TLS, and whoever reaches that port could move roles: there is no TLS in this version yet, so keep the port inside a trusted network and say insecure_plaintext = true, or use a loopback address"#,
    );
    let said = "insecure_plaintext = false\n".to_owned() + &common;
    check(
        &[("mmm_agent.toml", AGENT), ("mmm_common.toml", &said)],
        r#"
        mmm_common.toml:1: mmm_agentd would listen on 192.168.0.31 (the ip of 'db1') without TLS, and whoever reaches that port could move roles: there is no TLS in this version yet, so keep the port inside a trusted network and say insecure_plaintext = true, or use a loopback address"#,
    );
    // Another host's agent is not this one's business, and with the switch it is allowed.
    check(&[("mmm_agent.toml", &with(AGENT, "db1", "db2")), ("mmm_common.toml", &common)], "");
    let allowed = "insecure_plaintext = true\n".to_owned() + &common;
    check(&[("mmm_agent.toml", AGENT), ("mmm_common.toml", &allowed)], "");
}

// lessons.md 27
#[test]
fn many_mistakes_in_several_files_at_once() {
    let common = with(COMMON, "mode = \"slave\"", "mode = \"slav\"\npeer = \"db1\"\nport = 3");
    let common = with(&common, "\"db1\", \"db2\", \"db3\"", "\"db1\", \"db4\"");
    let mon = with(MON, "ping_ips", "lease_ttl = 1\nflap_count = \"3\"\nping_ip");
    check(
        &[("mmm_mon.toml", &mon), ("mmm_common.toml", &common)],
        r#"
        mmm_common.toml:23: mode is "master" or "slave", not "slav": did you mean 'slave'?
        mmm_common.toml:25: 'port' is no option in [host.db3]: it belongs in [monitor]
        mmm_common.toml:34: role 'reader' names host 'db4', which does not exist: known are db1, db2, db3
        mmm_mon.toml:4: ping_ips is missing in [monitor]: add ping_ips = ["192.168.0.1"] (addresses that always answer, as the gateway's)
        mmm_mon.toml:5: 'lease_ttl' is no option in [monitor]: it belongs at the top of the file, before the first [section]
        mmm_mon.toml:6: flap_count is a whole number from 1 on (without quotes), not "3"
        mmm_mon.toml:7: unknown option 'ping_ip' in [monitor]: did you mean 'ping_ips'?"#,
    );
}

// mmm_control.

#[test]
fn mmm_control_needs_only_the_monitors_address() {
    let folder = Folder::with(&[("mmm_mon.toml", &with(MON, "[monitor]", "[monitor]\nip = \"10.0.0.1\"\nport = 99"))]);
    let control = || parse::control(&folder.path("mmm_mon.toml")).map_err(|m| folder.shown(&m));
    // mmm_common.toml is not there, or cannot be read.
    let found = control().unwrap();
    assert_eq!((found.ip.to_string().as_str(), found.port, found.insecure_plaintext), ("10.0.0.1", 99, false));
    // It is there, and wrong in places that are not its business.
    folder.write("mmm_common.toml", b"insecure_plaintext = true\nlease_ttl = \"x\"\n[monitor]\nport = 98\n", 0o666);
    assert_eq!(control().map(|found| (found.port, found.insecure_plaintext)), Ok((99, true)));
    // Listening everywhere is no address to connect to.
    for (listens, connects) in [("0.0.0.0", "127.0.0.1"), ("::", "::1")] {
        folder.write("mmm_mon.toml", format!("[monitor]\nip = \"{listens}\"").as_bytes(), 0o640);
        assert_eq!(control().map(|found| found.ip.to_string()), Ok(connects.to_owned()));
    }
    folder.write("mmm_mon.toml", b"", 0o640);
    assert_eq!(control().map(|found| (found.ip.to_string(), found.port)), Ok(("127.0.0.1".to_owned(), 9988)));
}

#[test]
fn mmm_control_says_why_it_has_no_address() {
    let folder = Folder::with(&[]);
    let control = || parse::control(&folder.path("mmm_mon.toml")).map_err(|m| folder.shown(&m));
    let found = control().unwrap_err();
    assert!(found.contains("cannot read mmm_mon.toml: No such file"), "{found}");
    folder.write("mmm_mon.toml", b"[monitor]\nip = \"monhost\"\nport = 0", 0o640);
    let found = control().unwrap_err();
    assert_eq!(found.lines().count(), 2, "{found}");
    assert!(found.starts_with("mmm_mon.toml:2: ip is an IP address"), "{found}");
    // Perhaps it stands in the file that is missing.
    folder.write("mmm_mon.toml", b"include = [\"mmm_common.toml\"]", 0o640);
    let found = control().unwrap_err();
    assert!(found.starts_with("mmm_mon.toml:1: cannot read mmm_common.toml"), "{found}");
}

// Whatever stands in the files.

/// Words that lead deep into the parser.
fn word() -> impl Strategy<Value = String> {
    const KNOWN: &[&str] = &[
        "[host.default]\n",
        "[host.db1]\n",
        "[role.writer]\n",
        "[monitor]\n",
        "[check.ping]\n",
        "[agent]\n",
        "[[host]]\n",
        "[host]\n",
        "[tls]\n",
        "include",
        "this",
        "lease_ttl",
        "ip",
        "mode",
        "hosts",
        "ips",
        "port",
        "ping_ips",
        "peer",
        "agent_password",
        "agent_password_file",
        "kill_host_bin",
        " = ",
        " = ",
        " = ",
        "\n",
        "\n",
        "\n",
        "\"db1\"",
        "[\"db1\", \"db2\"]",
        "\"127.0.0.1\"",
        "\"3s\"",
        "3",
        "-1",
        "1e400",
        "nan",
        "99999999999999999999",
        "0x1f",
        "true",
        "{ a = 1 }",
        "1979-05-27",
        "\"",
        "'",
        "#",
        "[",
        "]",
        "\u{fc}",
        "\0",
        "\"mmm_mon.toml\"",
        "\"/dev/zero\"",
        "\"\"",
    ];
    prop_oneof![4 => prop::sample::select(KNOWN).prop_map(str::to_owned), 1 => any::<String>()]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_the_parser_panic(words in prop::collection::vec(word(), 0..40)) {
        let text: String = words.concat();
        let folder = Folder::with(&[("mmm_mon.toml", &text)]);
        let path = folder.path("mmm_mon.toml");
        let monitor = parse::monitor(&path);
        prop_assert!(monitor.is_err(), "these words hold no whole configuration:\n{text}");
        let lines = text.lines().count().max(1);
        for mistake in [monitor.err(), parse::agent(&path).err(), parse::control(&path).err()].into_iter().flatten().flatten() {
            prop_assert!(mistake.line.is_none_or(|line| (1..=lines).contains(&line)), "{mistake} of {lines} lines:\n{text}");
            prop_assert!(!mistake.text.is_empty());
        }
    }

    /// A piece is missing somewhere: whatever is said, a place is named and no password is repeated in a syntax error.
    #[test]
    fn a_damaged_file_is_told_with_its_place(at in 0..COMMON.len(), length in 1..60usize) {
        let end = (at + length).min(COMMON.len());
        let damaged = format!("{}{}", &COMMON[..at], &COMMON[end..]);
        let folder = Folder::with(&[("mmm_agent.toml", AGENT), ("mmm_common.toml", &damaged)]);
        for mistake in parse::agent(&folder.path("mmm_agent.toml")).err().into_iter().flatten() {
            prop_assert!(mistake.line.is_some() || mistake.file.ends_with("mmm_agent.toml"), "{mistake}");
            prop_assert!(!mistake.text.contains("SeCrEt") || !mistake.text.contains("syntax"), "{mistake}");
        }
    }
}
