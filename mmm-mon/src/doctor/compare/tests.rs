//! Three hosts as they should be, and each thing made wrong.

use super::*;
use mmm_common::config::Host;
use mmm_common::examine::SourceFacts;

fn cluster() -> Cluster {
    let host = |ip: &str, mode, peer: Option<&str>| Host::of(ip.parse().unwrap(), mode, peer.map(HostName::from));
    let hosts = [
        ("db1".into(), host("10.0.0.1", HostMode::Master, Some("db2"))),
        ("db2".into(), host("10.0.0.2", HostMode::Master, Some("db1"))),
        ("db3".into(), host("10.0.0.3", HostMode::Slave, None)),
    ];
    Cluster::of(hosts.into(), BTreeMap::new())
}

/// db1 is the writer.
fn good() -> Hosts {
    let of = |number: u64| {
        let source = if number == 1 { 2 } else { 1 };
        let heard = (1..=3).filter(|n| *n != number).map(|n| HostName(format!("db{n}"))).collect();
        let server = ServerFacts {
            mariadb: true,
            version: "10.11.6-MariaDB".into(),
            server_id: number,
            server_uuid: None,
            gtid_domain_id: Some(0),
            auto_increment_increment: 2,
            auto_increment_offset: if number == 2 { 2 } else { 1 },
            writable: number == 1,
            source: Some(SourceFacts { host: format!("10.0.0.{source}"), port: 3306 }),
            executed: None,
        };
        let facts = Facts {
            version: env!("CARGO_PKG_VERSION").into(),
            cluster: cluster_words(&cluster()),
            server: Some(server),
            heard: Some(heard),
        };
        (HostName(format!("db{number}")), facts)
    };
    (1..=3).map(of).collect()
}

/// What is not in order after this change, as `host subject severity`, and all of their texts.
fn found(change: impl FnOnce(&mut Hosts)) -> (Vec<String>, String) {
    let mut hosts = good();
    change(&mut hosts);
    let findings = judge(&cluster(), &hosts).findings;
    let bad: Vec<&Finding> = findings.iter().filter(|f| f.severity != Severity::Ok).collect();
    let names = bad.iter().map(|f| format!("{} {} {}", f.host.as_ref().unwrap(), f.subject, f.severity)).collect();
    (names, bad.iter().map(|f| format!("{} => {}\n", f.found, f.cure)).collect())
}

fn server<'a>(hosts: &'a mut Hosts, name: &str) -> &'a mut ServerFacts {
    hosts.get_mut(&name.into()).unwrap().server.as_mut().unwrap()
}

fn check(change: impl FnOnce(&mut Hosts), names: &[&str], words: &[&str]) {
    let (found, texts) = found(change);
    assert_eq!(found, names, "{texts}");
    for word in words {
        assert!(texts.contains(word), "'{word}' is not in {texts}");
    }
}

#[test]
fn hosts_as_they_should_be() {
    check(|_| {}, &[], &[]);
    let Compared { findings, writer } = judge(&cluster(), &good());
    assert_eq!(writer, Some("db1".into()));
    for subject in [
        Subject::Configuration,
        Subject::Arp,
        Subject::ServerId,
        Subject::GtidDomainId,
        Subject::Version,
        Subject::ReadOnly,
        Subject::Replication,
        Subject::AutoIncrement,
    ] {
        assert!(findings.iter().any(|f| f.subject == subject), "{subject} was looked at");
    }
}

#[test]
fn two_servers_with_one_name() {
    let twins = ["db1 server_id error", "db2 server_id error"];
    check(|h| server(h, "db2").server_id = 1, &twins, &["SET GLOBAL server_id=2;"]);
    let uuid = |h: &mut Hosts| {
        for db in ["db1", "db2"] {
            server(h, db).server_uuid = Some("u".into());
        }
    };
    check(uuid, &twins, &["auto.cnf"]);
}

#[test]
fn another_domain() {
    let cure = "SET GLOBAL gtid_domain_id=0; my.cnf [mysqld]: gtid_domain_id=0";
    check(|h| server(h, "db3").gtid_domain_id = Some(5), &["db3 gtid_domain_id error"], &[cure]);
}

#[test]
fn numbers_that_two_masters_give() {
    let one = ["db1 auto_increment warning", "db2 auto_increment warning"];
    let cure = "SET GLOBAL auto_increment_increment=2; SET GLOBAL auto_increment_offset=2;";
    check(|h| server(h, "db2").auto_increment_offset = 1, &one, &[cure]);
    check(|h| server(h, "db2").auto_increment_increment = 3, &one, &["db1 gives too"]);
    // A slave gives no numbers.
    check(|h| server(h, "db3").auto_increment_increment = 1, &[], &[]);
    assert!(!share_numbers((4, 1), (2, 2)) && share_numbers((4, 3), (2, 1)) && share_numbers((1, 1), (1, 1)));
    assert!(share_numbers((2, 3), (2, 1)), "an offset beyond the increment is ignored by the servers");
}

#[test]
fn who_can_be_written_to() {
    check(
        |h| server(h, "db2").writable = true,
        &["db1 read_only error", "db2 read_only error"],
        &["db1 and db2 at once", "SET GLOBAL read_only=1"],
    );
    check(
        |h| {
            server(h, "db1").writable = false;
            server(h, "db3").writable = true;
        },
        &["db3 read_only error"],
        &["this host is no master"],
    );
    check(
        |h| server(h, "db1").writable = false,
        &["db1 read_only notice", "db2 read_only notice", "db3 read_only notice"],
        &["set_online"],
    );
}

#[test]
fn where_replication_leads() {
    let from = |ip: &str| Some(SourceFacts { host: ip.to_owned(), port: 3306 });
    let cure = "CHANGE MASTER TO MASTER_HOST='10.0.0.1', MASTER_PORT=3306, MASTER_USER='<replication_user>', \
                MASTER_PASSWORD='<replication_password>', MASTER_USE_GTID=slave_pos; START SLAVE";
    check(|h| server(h, "db2").source = None, &["db2 replication error"], &["nobody", cure]);
    check(|h| server(h, "db1").source = None, &[], &[]);
    check(|h| server(h, "db3").source = from("10.0.0.2"), &["db3 replication error"], &["not the active master", cure]);
    check(|h| server(h, "db3").source = from("10.0.0.9"), &["db3 replication error"], &["no host of this cluster"]);
    check(|h| server(h, "db1").source = from("10.0.0.3"), &["db1 replication error"], &["db3, which is no master"]);
    check(|h| server(h, "db2").source = from("10.0.0.2"), &["db2 replication error"], &["from itself"]);
    let mysql = |h: &mut Hosts| {
        h.values_mut().for_each(|f| f.server.as_mut().unwrap().mariadb = false);
        server(h, "db3").source = None;
    };
    check(mysql, &["db3 replication error"], &["CHANGE REPLICATION SOURCE TO SOURCE_HOST='10.0.0.1'"]);
    let alone = |h: &mut Hosts| {
        h.values_mut().for_each(|f| f.server.as_mut().unwrap().mariadb = false);
        server(h, "db1").source = None;
    };
    check(alone, &["db1 replication warning"], &["SOURCE_HOST='10.0.0.2'"]);
}

#[test]
fn versions_that_others_cannot_read() {
    check(
        |h| server(h, "db2").version = "11.8.6-MariaDB".into(),
        &["db2 version warning"],
        &["11.8.6-MariaDB is newer than db1 (10.11.6-MariaDB), db3 (10.11.6-MariaDB)"],
    );
    check(|h| server(h, "db3").version = "11.8.6-MariaDB".into(), &[], &[]);
    check(|h| server(h, "db2").version = "10.11.9-MariaDB".into(), &[], &[]);
    check(|h| server(h, "db3").mariadb = false, &["db3 version error"], &["MySQL, and the others are MariaDB"]);
}

#[test]
fn another_configuration_is_told_word_by_word() {
    let change = |h: &mut Hosts| {
        let db2 = h.get_mut(&"db2".into()).unwrap();
        db2.cluster.insert("lease_ttl".into(), "5s".into());
        db2.version = "0.0.1".into();
    };
    let words = ["lease_ttl: the monitor has 3s, this host 5s", "0.0.1, the monitor's is"];
    check(change, &["db2 configuration error", "db2 agent notice"], &words);
}

#[test]
fn announcements_that_do_not_arrive() {
    let change = |h: &mut Hosts| h.get_mut(&"db3".into()).unwrap().heard = Some(vec!["db1".into()]);
    check(change, &["db3 arp warning"], &["nothing was heard of db2"]);
    // One that could not speak is its own finding.
    check(
        |h| {
            h.get_mut(&"db2".into()).unwrap().heard = None;
            for name in ["db1", "db3"] {
                h.get_mut(&name.into()).unwrap().heard.as_mut().unwrap().retain(|n| n.as_str() != "db2");
            }
        },
        &[],
        &[],
    );
}

#[test]
fn extra_transactions_are_counted_with_the_way_out() {
    let finding = |its: &str, writers: &str| {
        let gtids = |text: &str| Gtids::MariaDb(text.parse().unwrap());
        errant(&"db2".into(), &gtids(its), &"db1".into(), &gtids(writers))
    };
    assert_eq!(finding("0-1-7", "0-1-9").severity, Severity::Ok);
    let extra = finding("0-1-7,0-2-3", "0-1-9");
    assert_eq!((extra.severity, extra.host), (Severity::Error, Some("db2".into())));
    assert!(extra.found.starts_with("3; executed here: 0-1-7,0-2-3"), "{}", extra.found);
    assert_eq!(extra.cure, "mmm_control lost db2, then mmm_control reclone db2 --from db1");
}
