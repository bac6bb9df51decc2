//! What an operator buys MMM for, on real servers: the writer moves, or its host dies in one of several ways, while a
//! client writes. Each test prints the outage that the client saw. The limits are generous, because machines that run
//! tests are slow and shared; the figures are for reading. No test lets an address be on two hosts, or an acknowledged
//! write be lost.

use anyhow::{Context as _, Result, bail, ensure};
use mmm_tests::lab::client::{Client, ClientConfig};
use mmm_tests::lab::configs::Extra;
use mmm_tests::lab::network::{DB, GATEWAY, MONITOR, WRITER};
use mmm_tests::lab::{Lab, LabConfig, stays};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(30);

/// Given a cluster that serves and a client that writes; when `story` has happened; then nothing acknowledged is lost
/// on any host, and no address ever was on two hosts.
fn check(story: impl FnOnce(&Lab, &Client) -> Result<()>) -> Result<()> {
    check_with(&[], story)
}

/// With these lines at the top of mmm_common.toml.
fn check_with(common: &[&str], story: impl FnOnce(&Lab, &Client) -> Result<()>) -> Result<()> {
    let common = common.iter().map(|line| (*line).to_owned()).collect();
    let config = LabConfig { extra: Extra { common, ..Extra::default() }, ..LabConfig::default() };
    Lab::run(config, |lab| {
        let began = Instant::now();
        lab.bring_online()?;
        println!("online after {:.1} s", began.elapsed().as_secs_f64());
        let watch = lab.watch()?;
        let client = lab.client(ClientConfig::default())?;
        lab.wait_for("fifty acknowledged writes", SOON, || match client.journal().acknowledged().count() {
            50.. => Ok(()),
            n => bail!("{n} writes; {:?}", client.journal().troubles(began)),
        })?;
        story(lab, &client)?;
        client.wait_write(Instant::now(), SOON)?;
        let journal = client.finish();
        for host in DB {
            if is_kept_out(lab, host)? {
                println!("{host} is kept out of the cluster and not compared");
                continue;
            }
            lab.wait_for(&format!("every acknowledged write on {host}"), SOON, || {
                let found = journal.verify(&lab.socket(host))?;
                if found.is_right() { Ok(()) } else { bail!("{found:?}") }
            })?;
        }
        let seen = watch.finish()?;
        println!(
            "{} acknowledged writes, none lost on any host; the writer address: {}",
            journal.acknowledged().count(),
            seen.writer_moves.join(", ")
        );
        Ok(())
    })
}

/// Waits for the operator, with a reason in `show`: it has writes that nobody else has.
fn is_kept_out(lab: &Lab, host: &str) -> Result<bool> {
    let shown = lab.must_control(&["show"])?.text;
    let warned = shown.lines().any(|l| l.starts_with("# ") && l.contains(host));
    Ok(lab.state_of(host)? == "AWAITING_RECOVERY" && warned)
}

/// The longest time without an acknowledged write from `since` until the first write that was sent from now on.
fn outage(client: &Client, since: Instant, what: &str) -> Result<Duration> {
    let until = client.wait_write(Instant::now(), SOON)?;
    let journal = client.journal();
    let length = journal.outage(since, until).length();
    println!("{what}: write outage {:.3} s; met: {:?}", length.as_secs_f64(), journal.troubles(since));
    Ok(length)
}

fn other_master(host: &str) -> &'static str {
    if host == "db1" { "db2" } else { "db1" }
}

fn wait_writer(lab: &Lab, wanted: &str, limit: Duration) -> Result<()> {
    lab.wait_for(&format!("{wanted} to be the writer"), limit, || match lab.writer()? {
        host if host == wanted => Ok(()),
        host => bail!("{host} is the writer"),
    })
}

/// The new writer has every acknowledged write at the moment it takes over, not later.
fn nothing_lost_on(lab: &Lab, host: &str, client: &Client) -> Result<()> {
    let found = client.journal().verify(&lab.socket(host))?;
    ensure!(found.is_right(), "on {host}: {found:?}");
    Ok(())
}

// lessons.md 16, 25
#[test]
fn a_planned_move_loses_nothing_and_hangs_nobody() -> Result<()> {
    check(|lab, client| {
        for _ in 0..2 {
            let (old, since) = (lab.writer()?, Instant::now());
            let new = other_master(old);
            let answer = lab.must_control(&["move_role", "writer", new])?;
            ensure!(answer.text.starts_with("OK: Role 'writer' has been moved"), "{}", answer.text);
            ensure!(lab.writer()? == new, "the answer came before the move was done");
            let length = outage(client, since, &format!("move_role writer {new}"))?;
            nothing_lost_on(lab, new, client)?;
            ensure!(length < Duration::from_secs(3), "{length:?}");
            // A connect may meet the moment in which nobody has the address; TCP repeats it after a second only.
            let timeouts = client.journal().timeouts(since);
            ensure!(
                timeouts.statements == 0 && timeouts.connects <= 1,
                "calls that hung until their limit: {timeouts:?}"
            );
            ensure!(lab.read_only(old)?, "the old writer {old} is still writable");
            lab.wait_serving(SOON)?;
        }
        // Asking for what is so is no error.
        let again = lab.must_control(&["move_role", "writer", lab.writer()?])?;
        ensure!(again.text.contains("already"), "{}", again.text);
        Ok(())
    })
}

// lessons.md 17
#[test]
fn a_killed_server_is_succeeded_and_comes_back() -> Result<()> {
    check(|lab, client| {
        let old = lab.writer()?;
        let new = other_master(old);
        let since = Instant::now();
        lab.kill_mysqld(old)?;
        wait_writer(lab, new, SOON)?;
        let length = outage(client, since, &format!("kill -9 of {old}'s server"))?;
        nothing_lost_on(lab, new, client)?;
        ensure!(length < Duration::from_secs(10), "{length:?}");

        lab.start_mysqld(old)?;
        let back = Instant::now();
        lab.wait_back_online(old, SOON)?;
        ensure!(lab.wait_serving(SOON)? == new, "the writer went back without being told to");
        ensure!(lab.read_only(old)?, "{old} came back writable");
        // Started again after a crash, the new writer would fetch by itself from a source that it still knew.
        lab.wait_for(&format!("{new} to know no source"), SOON, || {
            let known = lab.replication(new)?;
            if known.is_empty() { Ok(()) } else { bail!("it knows {:?}", known.get("Master_Host")) }
        })?;
        let length = outage(client, back, &format!("return of {old}"))?;
        ensure!(length < Duration::from_secs(2), "the return was an outage of {length:?}");
        Ok(())
    })
}

#[test]
fn a_hanging_server_is_succeeded() -> Result<()> {
    check(|lab, client| {
        let old = lab.writer()?;
        let new = other_master(old);
        let since = Instant::now();
        lab.stop_mysqld(old)?;
        wait_writer(lab, new, SOON)?;
        let length = outage(client, since, &format!("SIGSTOP of {old}'s server"))?;
        nothing_lost_on(lab, new, client)?;
        ensure!(length < Duration::from_secs(20), "{length:?}");

        lab.cont_mysqld(old)?;
        lab.wait_for("the woken server to be read-only", SOON, || {
            if lab.read_only(old)? { Ok(()) } else { bail!("{old} is writable") }
        })?;
        // The write that it was at when it was stopped is committed when it wakes. Either it was known elsewhere and
        // the host follows the new writer, or nobody else has it and the host must not join.
        lab.wait_for(&format!("{old} to follow or to be kept out"), SOON, || {
            if is_kept_out(lab, old)? {
                return Ok(());
            }
            match lab.state_of(old)?.as_str() {
                "ONLINE" => lab.replicates(old),
                state => bail!("{old} is {state}"),
            }
        })?;
        // Nothing of it has reached the others: they follow the new writer.
        lab.wait_for("replication of db3", SOON, || lab.replicates("db3"))?;
        ensure!(lab.writer()? == new, "the writer went back without being told to");
        Ok(())
    })
}

#[test]
fn a_hanging_server_is_killed_where_that_is_configured() -> Result<()> {
    check_with(&["on_hang = \"kill\"", "hang_timeout = \"500ms\""], |lab, client| {
        let old = lab.writer()?;
        let new = other_master(old);
        let since = Instant::now();
        lab.stop_mysqld(old)?;
        wait_writer(lab, new, SOON)?;
        outage(client, since, &format!("SIGSTOP of {old}'s server, hang_timeout 500 ms"))?;
        nothing_lost_on(lab, new, client)?;
        lab.wait_for("the end of the stopped server", SOON, || {
            let runs =
                |(host, program, pid): &(_, _, Option<i32>)| *host == old && *program == "mysqld" && pid.is_some();
            if lab.running().iter().any(runs) { bail!("it is still there") } else { Ok(()) }
        })?;

        lab.start_mysqld(old)?;
        lab.wait_for(&format!("{old} to follow or to be kept out"), SOON, || {
            if is_kept_out(lab, old)? { Ok(()) } else { lab.replicates(old) }
        })?;
        ensure!(lab.read_only(old)? && lab.writer()? == new, "the writer went back without being told to");
        Ok(())
    })
}

/// Shorter than a kernel's lifetime can be: only the exact guard makes such leases possible.
#[test]
fn a_host_without_its_cable_is_succeeded_within_a_short_lease() -> Result<()> {
    check_with(&["lease_ttl = \"1s\"", "heartbeat_interval = \"200ms\""], |lab, client| {
        let old = lab.writer()?;
        let new = other_master(old);
        stays("the writer where it is", Duration::from_secs(5), || {
            ensure!(lab.writer()? == old, "the writer has moved");
            Ok(())
        })?;
        let since = Instant::now();
        lab.link_down(old)?;
        wait_writer(lab, new, SOON)?;
        let length = outage(client, since, &format!("cable of {old} out, lease_ttl 1 s"))?;
        nothing_lost_on(lab, new, client)?;
        ensure!(length < Duration::from_secs(20), "{length:?}");
        lab.link_up(old)?;
        lab.wait_for(&format!("{old} to follow or to be kept out"), SOON, || {
            if is_kept_out(lab, old)? { Ok(()) } else { lab.replicates(old) }
        })
    })
}

#[test]
fn a_host_without_its_cable_is_succeeded() -> Result<()> {
    check(|lab, client| {
        let old = lab.writer()?;
        let new = other_master(old);
        let since = Instant::now();
        lab.link_down(old)?;
        wait_writer(lab, new, SOON)?;
        let length = outage(client, since, &format!("cable of {old} out"))?;
        nothing_lost_on(lab, new, client)?;
        ensure!(length < Duration::from_secs(20), "{length:?}");
        ensure!(lab.holders(WRITER.into())? == [new], "the isolated host still has the writer address");
        ensure!(lab.read_only(old)?, "the isolated host {old} is writable");

        lab.link_up(old)?;
        lab.wait_back_online(old, SOON)?;
        ensure!(lab.wait_serving(SOON)? == new, "the writer went back without being told to");
        Ok(())
    })
}

#[test]
fn a_replica_that_stopped_loses_its_reader_until_it_is_back() -> Result<()> {
    /// A replica's trouble is ignored within 60 s of its peer coming online.
    const IGNORED_AND_SOON: Duration = Duration::from_secs(90);
    check(|lab, client| {
        ensure!(lab.readers_of("db3")?.len() == 1, "db3 has {:?}", lab.readers_of("db3")?);
        let since = Instant::now();
        lab.mysql("db3", "STOP SLAVE SQL_THREAD")?;
        lab.wait_for("db3 without a reader", IGNORED_AND_SOON, || match lab.readers_of("db3")?.as_slice() {
            [] => Ok(()),
            some => bail!("db3 has {some:?}"),
        })?;
        println!("reader taken from the stopped replica after {:.1} s", since.elapsed().as_secs_f64());
        ensure!(lab.state_of("db3")? == "REPLICATION_FAIL", "db3 is {}", lab.state_of("db3")?);
        lab.wait_for("its reader on another host", SOON, || {
            let counts = [lab.readers_of("db1")?.len(), lab.readers_of("db2")?.len()];
            if counts.iter().sum::<usize>() == 3 { Ok(()) } else { bail!("readers of db1 and db2: {counts:?}") }
        })?;

        let back = Instant::now();
        lab.mysql("db3", "START SLAVE SQL_THREAD")?;
        lab.wait_for("a reader on db3", SOON, || match lab.readers_of("db3")?.len() {
            1 => Ok(()),
            n => bail!("db3 has {n}"),
        })?;
        println!("reader given back after {:.1} s", back.elapsed().as_secs_f64());

        // By now its peer has been online for long: only trap_period (3 s) is waited for.
        let again = Instant::now();
        lab.mysql("db3", "STOP SLAVE SQL_THREAD")?;
        lab.wait_for("db3 without a reader again", SOON, || match lab.readers_of("db3")?.as_slice() {
            [] => Ok(()),
            some => bail!("db3 has {some:?}"),
        })?;
        let took = again.elapsed();
        println!("reader taken from the replica that stopped again after {:.1} s", took.as_secs_f64());
        ensure!(took < Duration::from_secs(15), "it took {took:?}");
        lab.mysql("db3", "START SLAVE SQL_THREAD")?;
        let length = outage(client, since, "a replica's trouble")?;
        ensure!(length < Duration::from_secs(2), "the writer's clients noticed: {length:?}");
        Ok(())
    })
}

#[test]
fn set_offline_takes_everything_and_set_online_gives_it_back() -> Result<()> {
    check(|lab, client| {
        lab.must_control(&["set_offline", "db3"])?;
        lab.wait_state("db3", "ADMIN_OFFLINE", SOON)?;
        lab.wait_for("db3 without a reader", SOON, || match lab.readers_of("db3")?.len() {
            0 => Ok(()),
            n => bail!("db3 has {n}"),
        })?;
        lab.must_control(&["set_online", "db3"])?;
        lab.wait_serving(SOON)?;
        lab.wait_for("a reader on db3", SOON, || match lab.readers_of("db3")?.len() {
            1 => Ok(()),
            n => bail!("db3 has {n}"),
        })?;

        let old = lab.writer()?;
        let since = Instant::now();
        lab.must_control(&["set_offline", old])?;
        wait_writer(lab, other_master(old), SOON)?;
        let length = outage(client, since, &format!("set_offline of the writer {old}"))?;
        ensure!(length < Duration::from_secs(10), "{length:?}");
        nothing_lost_on(lab, other_master(old), client)?;
        lab.must_control(&["set_online", old])?;
        ensure!(lab.wait_serving(SOON)? == other_master(old), "the writer went back without being told to");
        Ok(())
    })
}

#[test]
fn a_monitor_restart_moves_nothing() -> Result<()> {
    check(|lab, client| {
        let places = |lab: &Lab| -> Result<Vec<_>> {
            let mut places = vec![lab.network().addresses("db1")?];
            places.push(lab.network().addresses("db2")?);
            places.push(lab.network().addresses("db3")?);
            Ok(places)
        };
        let before = places(lab)?;
        let since = Instant::now();
        lab.kill_monitor()?;
        std::thread::sleep(Duration::from_millis(1000));
        lab.start_monitor()?;
        // Longer than lease and margin together: whatever the restart broke has shown by then.
        stays("every address", Duration::from_secs(8), || {
            let now = places(lab)?;
            if now == before { Ok(()) } else { bail!("{before:?} became {now:?}") }
        })?;
        let length = outage(client, since, "monitor killed and started again")?;
        ensure!(length < Duration::from_secs(2), "{length:?}");
        for host in DB {
            ensure!(lab.state_of(host)? == "ONLINE", "{host} is {}", lab.state_of(host)?);
        }
        Ok(())
    })
}

// lessons.md 11
#[test]
fn show_answers_while_an_agent_and_a_host_hang() -> Result<()> {
    check(|lab, _| {
        let shows = |what: &str| -> Result<()> {
            let mut took = Vec::new();
            let began = Instant::now();
            while began.elapsed() < Duration::from_secs(6) {
                took.push(lab.must_control(&["show"])?.took);
                std::thread::sleep(Duration::from_millis(100));
            }
            took.sort();
            let (median, worst) = (took[took.len() / 2], took.last().copied().context("no show")?);
            println!("{what}: show answers in {median:?} (median of {}), {worst:?} (worst)", took.len());
            ensure!(median < Duration::from_millis(200), "show takes {median:?}");
            ensure!(worst < Duration::from_secs(1), "one show took {worst:?}");
            Ok(())
        };
        lab.stop_agent("db3")?;
        shows("agent of db3 stopped")?;
        lab.cont_agent("db3")?;
        // Silence without a reset: what a crashed host looks like.
        lab.cut_both(MONITOR, "db3")?;
        shows("db3 silent for the monitor")?;
        lab.heal_all()?;
        lab.wait_back_online("db3", SOON)
    })
}

#[test]
fn without_its_own_network_the_monitor_changes_nothing() -> Result<()> {
    check(|lab, client| {
        let readers = |lab: &Lab| -> Result<Vec<_>> { Ok(vec![lab.readers_of("db1")?, lab.readers_of("db2")?]) };
        let (writer, before, since) = (lab.writer()?, readers(lab)?, Instant::now());
        lab.cut_both(MONITOR, GATEWAY)?;
        lab.wait_for("the failed network check in the log", SOON, || {
            let log = std::fs::read_to_string(lab.dir().join(MONITOR).join("mmm_mond.log"))?;
            if log.contains("none of ping_ips answers") { Ok(()) } else { bail!("it is not there") }
        })?;
        // Now a failed check says nothing about db3: it keeps its state, and nobody gets its address.
        lab.cut_both(MONITOR, "db3")?;
        stays("writer, readers and states", Duration::from_secs(10), || {
            ensure!(lab.writer()? == writer && readers(lab)? == before, "{} {:?}", lab.writer()?, readers(lab)?);
            ensure!(lab.state_of("db3")? == "ONLINE", "db3 is {}", lab.state_of("db3")?);
            Ok(())
        })?;
        lab.heal_all()?;
        lab.wait_serving(SOON)?;
        ensure!(lab.writer()? == writer, "the writer moved from {writer} to {}", lab.writer()?);
        let length = outage(client, since, "monitor without its gateway")?;
        ensure!(length < Duration::from_secs(2), "{length:?}");
        Ok(())
    })
}
