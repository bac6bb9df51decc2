//! The lab itself, without the daemons: real servers replicate, faults do what their names say, the client measures an
//! outage of known length, and nothing is left afterwards.

use anyhow::{Result, bail, ensure};
use mmm_tests::lab::client::ClientConfig;
use mmm_tests::lab::network::{DB, WRITER, ip_of};
use mmm_tests::lab::{Lab, LabConfig, process, wait_for};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(20);

fn servers_only() -> LabConfig {
    LabConfig { daemons: false, ..LabConfig::default() }
}

/// One echo, half a second at most.
fn ping(lab: &Lab, from: &str, to: &str) -> Result<bool> {
    let mut ping = Command::new("ping");
    ping.args(["-c1", "-W0.5", "-n", &ip_of(to)?.to_string()]);
    Ok(lab.exec(from, ping, Duration::from_secs(5))?.ok())
}

/// After a cut the kernel may wait up to a second before it asks for the neighbour's address again.
fn wait_ping(lab: &Lab, from: &str, to: &str) -> Result<()> {
    wait_for(&format!("{from} to reach {to}"), SOON, || if ping(lab, from, to)? { Ok(()) } else { bail!("no echo") })
}

fn count(lab: &Lab, host: &str) -> Result<String> {
    Ok(lab.mysql(host, "SELECT COUNT(*) FROM app.t")?.value()?.to_owned())
}

fn wait_count(lab: &Lab, host: &str, wanted: &str) -> Result<()> {
    lab.wait_for(&format!("{wanted} rows on {host}"), SOON, || {
        let seen = count(lab, host)?;
        if seen == wanted { Ok(()) } else { bail!("{seen} rows") }
    })
}

#[test]
fn servers_replicate_and_faults_do_what_they_say() -> Result<()> {
    let began = Instant::now();
    Lab::run(servers_only(), |lab| {
        println!("servers and replication up after {:.1} s", began.elapsed().as_secs_f64());
        replicates(lab)?;
        cuts_one_way(lab)?;
        cable_out_and_in(lab)?;
        stopped_and_killed_servers(lab)
    })
}

fn replicates(lab: &Lab) -> Result<()> {
    for host in DB {
        ensure!(lab.read_only(host)?, "{host} is writable at the start");
    }
    lab.make_writer_by_hand("db1")?;
    ensure!(lab.holders(WRITER.into())? == ["db1"], "holders: {:?}", lab.holders(WRITER.into())?);
    ensure!(lab.writer()? == "db1");
    lab.mysql("db1", "INSERT INTO app.t (id, server) VALUES (1, @@server_id), (2, @@server_id)")?;
    wait_count(lab, "db2", "2")?;
    wait_count(lab, "db3", "2")?;
    // The other way round the circle: from db2 to db1, and through db1 to db3, with the numbers of db2.
    lab.mysql("db2", "SET GLOBAL read_only=0")?;
    lab.mysql("db2", "INSERT INTO app.t (id, server) VALUES (3, @@server_id)")?;
    lab.mysql("db2", "SET GLOBAL read_only=1")?;
    wait_count(lab, "db1", "3")?;
    wait_count(lab, "db3", "3")?;
    let n = lab.mysql("db3", "SELECT n FROM app.t WHERE id=3")?;
    ensure!(n.value()?.parse::<u64>()? % 2 == 0, "auto_increment_offset of db2: n = {}", n.value()?);
    Ok(())
}

fn cuts_one_way(lab: &Lab) -> Result<()> {
    ensure!(ping(lab, "db1", "db3")? && ping(lab, "db3", "db1")?, "db1 and db3 reach each other");
    lab.cut("db1", "db3")?;
    ensure!(!ping(lab, "db3", "db1")?, "answers from db1 reach db3 through the cut");
    // What db3 sends still arrives: db1's kernel sees the echo requests, whose answers are dropped.
    let seen = |lab: &Lab| -> Result<u64> {
        let mut nstat = Command::new("sh");
        nstat.args(["-c", "awk '/^Icmp:/ {l=$0} END {split(l, f); print f[10]}' /proc/net/snmp"]);
        // /proc/net belongs to the reader's own thread group, which is in db1's namespace.
        Ok(lab.exec("db1", nstat, Duration::from_secs(5))?.text.trim().parse()?)
    };
    let before = seen(lab)?;
    ensure!(!ping(lab, "db3", "db1")?);
    let after = seen(lab)?;
    ensure!(after == before + 1, "echo requests that reached db1: {before}, then {after}");
    ensure!(ping(lab, "db2", "db1")?, "db2 is not concerned");
    lab.heal("db1", "db3")?;
    wait_ping(lab, "db3", "db1")?;
    lab.cut_both("mon", "gw")?;
    ensure!(!ping(lab, "mon", "gw")? && ping(lab, "mon", "db1")?, "the monitor is cut from the gateway only");
    lab.heal_all()?;
    wait_ping(lab, "mon", "gw")
}

fn cable_out_and_in(lab: &Lab) -> Result<()> {
    lab.link_down("db2")?;
    ensure!(!ping(lab, "db1", "db2")?, "the cable is out");
    ensure!(lab.read_only("db1").is_ok() && lab.mysql("db2", "SELECT 1").is_ok(), "the sockets work without a network");
    lab.link_up("db2")?;
    wait_ping(lab, "db1", "db2")?;
    lab.wait_for("replication of db2", SOON, || lab.replicates("db2"))
}

fn stopped_and_killed_servers(lab: &Lab) -> Result<()> {
    lab.stop_mysqld("db3")?;
    ensure!(lab.mysql("db3", "SELECT 1").is_err(), "a stopped server answers");
    lab.cont_mysqld("db3")?;
    lab.wait_for("an answer of db3", SOON, || lab.mysql("db3", "SELECT 1"))?;

    lab.kill_mysqld("db1")?;
    ensure!(lab.mysql("db1", "SELECT 1").is_err(), "a killed server answers");
    lab.start_mysqld("db1")?;
    ensure!(lab.read_only("db1")?, "after a crash db1 is read-only, as its file says");
    ensure!(count(lab, "db1")? == "3");
    for host in DB {
        lab.wait_for(&format!("replication of {host}"), SOON, || lab.replicates(host))?;
    }
    Ok(())
}

#[test]
fn the_client_measures_an_outage_of_known_length() -> Result<()> {
    Lab::run(servers_only(), |lab| {
        lab.make_writer_by_hand("db1")?;
        let client = lab.client(ClientConfig::default())?;
        client.wait_write(Instant::now(), SOON)?;

        let stopped = Instant::now();
        lab.stop_mysqld("db1")?;
        thread::sleep(Duration::from_millis(1500));
        lab.cont_mysqld("db1")?;
        let continued = Instant::now();
        client.wait_write(continued, SOON)?;
        lab.wait_for("fifty acknowledged writes", SOON, || match client.journal().acknowledged().count() {
            50.. => Ok(()),
            n => bail!("{n}"),
        })?;
        let journal = client.journal();
        let outage = journal.outage(stopped, Instant::now()).length();
        let real = continued - stopped;
        println!("stopped for {real:?}, the client saw an outage of {outage:?}");
        ensure!(outage >= real - Duration::from_millis(100), "too short: {outage:?} of {real:?}");
        ensure!(outage <= real + Duration::from_secs(2), "too long: {outage:?} of {real:?}");
        let timeouts = journal.timeouts(stopped);
        ensure!(timeouts.statements == 1 && timeouts.connects >= 1, "calls at their limit: {timeouts:?}");

        // A row that the client was promised and that is not there must be found, on every host.
        let journal = client.finish();
        let last = journal.acknowledged().last().map_or(0, |w| w.id);
        for host in DB {
            lab.wait_for(&format!("the last row on {host}"), SOON, || {
                lab.mysql(host, &format!("SELECT id FROM app.t WHERE id={last}"))?.value().map(drop)
            })?;
            let found = journal.verify(&lab.socket(host))?;
            ensure!(found.is_right() && found.acknowledged >= 50, "{host}: {found:?}");
        }
        lab.mysql("db1", &format!("DELETE FROM app.t WHERE id={last}"))?;
        lab.mysql(
            "db1",
            &format!("INSERT INTO app.t (id, server) SELECT id, server FROM app.t WHERE id={}", last - 1),
        )?;
        let found = journal.verify(&lab.socket("db1"))?;
        ensure!(found.missing == [last] && found.duplicates == [last - 1], "{found:?}");

        // A read-only server refuses, and that is no unknown outcome.
        lab.mysql("db1", "SET GLOBAL read_only=1")?;
        let client = lab.client(ClientConfig::default())?;
        let refused = lab.wait_for("a refused write", SOON, || {
            let troubles = client.journal().troubles(stopped);
            if troubles.keys().any(|why| why.starts_with("refused: 1290")) { Ok(()) } else { bail!("{troubles:?}") }
        });
        ensure!(client.finish().acknowledged().count() == 0, "a read-only server acknowledged a write");
        refused
    })
}

#[test]
fn nothing_is_left_when_a_lab_is_dropped() -> Result<()> {
    let lab = Lab::up(servers_only())?;
    let dir = lab.dir().to_owned();
    let pids: Vec<i32> = lab.running().into_iter().filter_map(|(.., pid)| pid).collect();
    let namespaces: Vec<PathBuf> = lab.network().all_netns();
    ensure!(pids.len() == 3 && namespaces.len() == 6, "{pids:?} {namespaces:?}");
    // Somebody's command inside the lab goes with it.
    let mut sleep = process::within(&lab.network().netns("db2"), || Command::new("sleep").arg("600").spawn())??;
    drop(lab);
    ensure!(!sleep.wait()?.success(), "the command inside the lab has ended by itself");
    ensure!(!dir.exists(), "{} is left", dir.display());
    for ns in namespaces {
        ensure!(!ns.exists(), "{} is left", ns.display());
    }
    for pid in pids {
        ensure!(process::Running::of(pid).is_none_or(|r| !r.is_alive()), "process {pid} is left");
    }
    Ok(())
}
