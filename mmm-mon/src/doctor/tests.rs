//! The monitor's own part, against agents that answer, or do not.

use super::*;
use crate::checks::tests::in_namespace;
use mmm_common::state::HostMode;
use std::os::unix::fs::PermissionsExt as _;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;

/// One host, whose agent says these lines to whoever asks and then closes. No database is there.
async fn doctor(says: &'static [&'static str]) -> Doctor {
    let agent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut host = Host::of("127.0.0.1".parse().unwrap(), HostMode::Master, None);
    host.agent_port = agent.local_addr().unwrap().port();
    host.mysql_port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    host.monitor_user = "mmm_monitor".into();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = agent.accept().await.unwrap();
            let mut request = vec![0; 1024];
            let n = stream.read(&mut request).await.unwrap();
            let asked: ToAgent = serde_json::from_slice(&request[..n]).unwrap();
            assert!(matches!(asked, ToAgent::Examine { protocol: PROTOCOL, monitor: 7, .. }), "{asked:?}");
            for line in says {
                stream.write_all(format!("{line}\n").as_bytes()).await.unwrap();
            }
        }
    });
    let config = Config::of(Cluster::of([("db1".into(), host)].into(), BTreeMap::new()));
    Doctor::new(watch::channel(Arc::new(config)).1, 7)
}

fn only(findings: &[Finding], subject: Subject) -> &Finding {
    let of: Vec<&Finding> = findings.iter().filter(|f| f.subject == subject).collect();
    assert_eq!(of.len(), 1, "{findings:?}");
    of[0]
}

#[tokio::test]
async fn what_an_agent_finds_is_its_hosts_and_the_clock_is_compared() {
    let doctor = doctor(&[
        r#"{"message":"examining","unix_ms":1000}"#,
        r#"{"message":"examined","findings":[{"host":"db9","subject":"log_bin","severity":"error","tried":"t","found":"f","cure":"c"}],"facts":{"version":"x","cluster":{},"server":null,"heard":null}}"#,
    ])
    .await;
    let findings = doctor.examine().await;
    let log_bin = only(&findings, Subject::LogBin);
    assert_eq!((log_bin.host.clone(), log_bin.severity), (Some("db1".into()), Severity::Error));
    let clock = only(&findings, Subject::Clock);
    assert!(clock.severity == Severity::Warning && clock.cure.contains("chrony"), "{clock:?}");
    assert_eq!(
        only(&findings, Subject::Configuration).severity,
        Severity::Error,
        "it told nothing of its configuration"
    );
    let user = only(&findings, Subject::MonitorUser);
    assert!(user.severity == Severity::Error && user.found.contains("refuses connections"), "{user:?}");
    assert_eq!(findings[0].host, None, "the monitor's own come first");
}

#[tokio::test]
async fn an_agent_that_does_not_answer_is_one_finding() {
    for (says, word) in [
        (&[][..], "closed the connection"),
        (&["HTTP/1.1 400"][..], "no mmm_agentd of this version"),
        (&[r#"{"message":"refused","why":"this host is being examined already"}"#][..], "it refuses: this host"),
        (&[r#"{"message":"examining","unix_ms":1}"#][..], "closed the connection"),
        (&[r#"{"message":"examining","unix_ms":1}"#, r#"{"message":"examining","unix_ms":1}"#][..], "something else"),
    ] {
        let findings = doctor(says).await.examine().await;
        let agent = only(&findings, Subject::Agent);
        assert!(agent.severity == Severity::Error && agent.found.contains(word), "{word}: {agent:?}");
        assert!(agent.cure.starts_with("start mmm_agentd on db1"), "{agent:?}");
    }
}

#[test]
fn a_clock_within_the_round_trip_is_right() {
    let round_trip = Duration::from_millis(40);
    for its in [100_000, 100_020, 100_040, 100_900] {
        assert_eq!(clock(its, 100_000, round_trip).severity, Severity::Ok, "{its}");
    }
    for its in [98_000, 101_041] {
        assert_eq!(clock(its, 100_000, round_trip).severity, Severity::Warning, "{its}");
    }
}

#[test]
fn a_kill_script_is_looked_at_and_never_run() {
    let dir = tempfile::tempdir().unwrap();
    let bin = dir.path().join("kill_host");
    assert_eq!(kill_host(None).severity, Severity::Notice);
    assert_eq!(kill_host(Some(&bin)).severity, Severity::Error, "it is not there");
    std::fs::write(&bin, format!("#!/bin/sh\ntouch {}/ran\n", dir.path().display())).unwrap();
    std::fs::set_permissions(&bin, std::fs::Permissions::from_mode(0o644)).unwrap();
    let finding = kill_host(Some(&bin));
    assert!(finding.severity == Severity::Error && finding.cure.starts_with("chmod 755"), "{finding:?}");
    std::fs::set_permissions(&bin, std::fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(kill_host(Some(&bin)).severity, Severity::Ok);
    assert_eq!(kill_host(Some(dir.path())).severity, Severity::Error);
    assert!(!dir.path().join("ran").exists());
}

#[test]
fn an_address_for_the_network_check_that_does_not_answer() {
    in_namespace("doctor::tests::inside_the_network", "");
}

#[tokio::test]
#[ignore = "run by an_address_for_the_network_check_that_does_not_answer"]
async fn inside_the_network() {
    let ips = ["127.0.0.1", "192.0.2.1"].map(|ip| ip.parse().unwrap());
    let findings = ping_ips(&ips).await;
    let severities: Vec<Severity> = findings.iter().map(|f| f.severity).collect();
    assert_eq!(severities, [Severity::Ok, Severity::Warning], "{findings:?}");
    assert_eq!(ping_ips(&ips[1..]).await[0].severity, Severity::Error, "the only one");
}
