//! Agents vouch for each other: what that must mean on real servers (issue "never two holders", "What it must show").
//! Each story runs with real daemons and a client that writes every 20 ms through the writer address; a watcher looks
//! into every kernel every few milliseconds, and no story lets an address be on two hosts or an acknowledged write be
//! lost.
//!
//! Every story prints lines `FIGURE story what value unit`. What is asked of safety is asserted with a second to spare,
//! what is asked of speed with more, because machines that run tests are slow and shared.

#[path = "lab_vouching/footprint.rs"]
mod footprint;
#[path = "lab_vouching/forger.rs"]
mod forger;
#[path = "lab_vouching/stranger.rs"]
mod stranger;

use anyhow::{Context as _, Result, bail, ensure};
use mmm_tests::lab::client::{Client, ClientConfig, Write};
use mmm_tests::lab::network::{DB, MONITOR, WRITER};
use mmm_tests::lab::process::Running;
use mmm_tests::lab::watch::{Seen, Watch};
use mmm_tests::lab::{Lab, LabConfig, stays, wait_for};
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use stranger::{Ears, Stranger, roles};

const SOON: Duration = Duration::from_secs(40);
/// The default of `lease_ttl`.
const LEASE: Duration = Duration::from_secs(3);
/// The kernel's lateness, and the drift of clocks over a lease (safety.md, `margin`).
const MARGIN: Duration = Duration::from_millis(1500);
/// What is given to a slow machine where lateness is no danger.
const PATIENCE: Duration = Duration::from_secs(5);
/// A write outage shorter than this is none: no role has moved, and the client was held up by the machine.
const NO_OUTAGE: Duration = Duration::from_secs(1);

fn figure(story: &str, what: &str, value: Duration) {
    println!("FIGURE {story} {what} {:.3} s", value.as_secs_f64());
}

/// Given a cluster that serves, with semi-synchronous replication between the masters.
fn with_cluster(story: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    in_lab(LabConfig::default(), story)
}

fn in_lab(config: LabConfig, story: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    Lab::run(config, |lab| {
        lab.bring_online()?;
        story(lab)
    })
}

/// A client that has begun to write, and a watcher.
fn writing(lab: &Lab) -> Result<(Client, Watch)> {
    let watch = lab.watch()?;
    let (client, began) = (lab.client(ClientConfig::default())?, Instant::now());
    lab.wait_for("fifty acknowledged writes", SOON, || match client.journal().acknowledged().count() {
        50.. => Ok(()),
        n => bail!("{n} writes; {:?}", client.journal().troubles(began)),
    })?;
    Ok((client, watch))
}

/// Then every host that is in the cluster has every acknowledged write, and no address was on two hosts.
fn nothing_is_lost_and_nothing_was_doubled(lab: &Lab, story: &str, client: Client, watch: Watch) -> Result<Seen> {
    nothing_else_is_lost(lab, story, client, watch, &BTreeSet::new())
}

/// The same, where some writes had to be lost.
fn nothing_else_is_lost(lab: &Lab, story: &str, client: Client, watch: Watch, lost: &BTreeSet<u64>) -> Result<Seen> {
    client.wait_write(Instant::now(), SOON)?;
    let journal = client.finish();
    for host in DB {
        if is_kept_out(lab, host)? {
            println!("{story}: {host} is kept out of the cluster and not compared");
            continue;
        }
        lab.wait_for(&format!("every acknowledged write on {host}"), SOON, || {
            let mut found = journal.verify(&lab.socket(host))?;
            found.missing.retain(|id| !lost.contains(id));
            if found.is_right() { Ok(()) } else { bail!("{found:?}") }
        })?;
    }
    let seen = watch.finish()?;
    println!(
        "{story}: {} acknowledged writes, {} lost; {} looks, never two holders; the writer address: {}",
        journal.acknowledged().count(),
        lost.len(),
        seen.rounds,
        seen.writer_moves.join(", ")
    );
    Ok(seen)
}

/// Waits for the operator, with a reason in `show`: it has writes that nobody else has.
fn is_kept_out(lab: &Lab, host: &str) -> Result<bool> {
    let shown = show(lab)?;
    let warned = shown.lines().any(|l| l.starts_with("# ") && l.contains(host) && l.contains("transactions"));
    Ok(lab.state_of(host)? == "AWAITING_RECOVERY" && warned)
}

fn show(lab: &Lab) -> Result<String> {
    Ok(lab.must_control(&["show"])?.text)
}

fn other_master(host: &str) -> &'static str {
    if host == "db1" { "db2" } else { "db1" }
}

/// The role addresses in the host's kernel.
fn roles_of(lab: &Lab, host: &str) -> Result<BTreeSet<Ipv4Addr>> {
    let there = lab.network().addresses(host)?;
    Ok(roles().into_iter().filter(|ip| there.contains(&IpAddr::V4(*ip))).collect())
}

/// How long the kernel went on having a role address.
fn until_gone(lab: &Lab, host: &str, since: Instant) -> Result<Duration> {
    wait_for(&format!("{host} without role addresses"), LEASE + PATIENCE, || match roles_of(lab, host)? {
        left if left.is_empty() => Ok(since.elapsed()),
        left => bail!("it has {left:?}"),
    })
}

fn becomes_read_only(lab: &Lab, host: &str) -> Result<()> {
    lab.wait_for("a read-only server", SOON, || {
        if lab.read_only(host)? { Ok(()) } else { bail!("the server on {host} is writable") }
    })
}

/// The first write that the client was acknowledged by this host's server.
fn first_write_on(lab: &Lab, host: &str, client: &Client) -> Result<Write> {
    lab.wait_for(&format!("an acknowledged write on {host}"), SOON, || {
        let journal = client.journal();
        let sql = format!("SELECT MIN(id) FROM app.t WHERE server = @@server_id AND id >= {}", journal.base);
        let first: u64 = lab.mysql(host, &sql)?.value()?.parse()?;
        let write = journal.acknowledged().find(|w| w.id >= first).cloned();
        write.with_context(|| format!("write {first} has no acknowledgement"))
    })
}

fn running(lab: &Lab, host: &str, program: &str) -> Result<Running> {
    let file = lab.dir().join(host).join(format!("{program}.run"));
    Running::load(&file).with_context(|| format!("{program} does not run on {host}"))
}

fn log_of(lab: &Lab, host: &str, program: &str) -> Result<String> {
    let file: PathBuf = lab.dir().join(host).join(format!("{program}.log"));
    std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))
}

// ---- faults that must move the roles --------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Agent {
    Runs,
    Killed,
    Stopped,
}

/// Given a writer with a reader address as well, whose agent runs, was killed or was stopped; when it is cut from the
/// monitor and the other database hosts, and clients still reach it; then its addresses fall silent in time, and the
/// other master writes.
fn isolated(story: &str, agent: Agent, semisync: bool) -> Result<()> {
    in_lab(LabConfig { semisync, ..LabConfig::default() }, |lab| {
        let old = lab.writer()?;
        let new = other_master(old);
        let addresses: Vec<Ipv4Addr> = roles_of(lab, old)?.into_iter().collect();
        ensure!(
            addresses.len() > 1 && addresses.contains(&WRITER),
            "{old} has {addresses:?}, and should have a reader"
        );
        let (client, watch) = writing(lab)?;
        let stranger = Stranger::join(lab)?;
        let ears = Ears::open(lab, &stranger, old, &addresses)?;

        match agent {
            Agent::Runs => {}
            Agent::Killed => lab.kill_agent(old)?,
            Agent::Stopped => lab.stop_agent(old)?,
        }
        let others: Vec<&str> = DB.into_iter().chain([MONITOR]).filter(|h| *h != old).collect();
        let both = |other: &&str| [(old.to_owned(), (*other).to_owned()), ((*other).to_owned(), old.to_owned())];
        let cut = Instant::now();
        lab.network().set_cuts(&others.iter().flat_map(both).collect())?;
        println!("{story}: {old} with {addresses:?} is cut off; cutting took {:?}", cut.elapsed());

        let gone = until_gone(lab, old, cut)?;
        let wrote = first_write_on(lab, new, &client)?.ended;
        let mut on_takeover = client.journal().verify(&lab.socket(new))?;
        stays("an isolated host without role addresses", Duration::from_secs(2), || {
            let there = roles_of(lab, old)?;
            ensure!(there.is_empty(), "{old} has {there:?} again");
            Ok(())
        })?;
        let (arp, tcp) = ears.close()?;
        let last = |heard: stranger::Heard| heard.last.map_or(Duration::ZERO, |at| at.saturating_duration_since(cut));
        figure(story, "addresses_gone_from_the_kernel", gone);
        figure(story, "last_ARP_answer", last(arp));
        figure(story, "last_TCP_connection_taken", last(tcp));
        figure(story, "other_master_writes", wrote.saturating_duration_since(cut));
        let outage = client.journal().outage(cut, Instant::now()).length();
        figure(story, "write_outage", outage);

        let silent = if agent == Agent::Runs { LEASE } else { LEASE + MARGIN } + Duration::from_secs(1);
        ensure!(gone <= silent, "the addresses left the kernel only after {gone:?}");
        ensure!(last(arp) <= silent, "the last ARP answer came after {:?}", last(arp));
        ensure!(last(tcp) <= silent, "the last TCP connection was taken after {:?}", last(tcp));
        let wrote = wrote.saturating_duration_since(cut);
        ensure!(wrote <= LEASE + Duration::from_millis(2500) + PATIENCE, "{new} wrote only after {wrote:?}");
        // With a semi-synchronous copy the isolated writer has acknowledged nothing that the other master lacks. Without,
        // only what it acknowledged while it was isolated and could be reached, or in the moment before.
        let lost: BTreeSet<u64> = if semisync { BTreeSet::new() } else { on_takeover.missing.drain(..).collect() };
        ensure!(on_takeover.is_right(), "on {new} when it took over: {on_takeover:?}");
        if !semisync {
            println!("FIGURE {story} acknowledged_without_a_copy_and_lost {} writes", lost.len());
        }
        let alone = cut - Duration::from_millis(500)..=cut + silent;
        for write in client.journal().writes.iter().filter(|w| lost.contains(&w.id)) {
            ensure!(alone.contains(&write.ended), "write {} is lost: {write:?}; cut off at {cut:?}", write.id);
        }
        if agent == Agent::Runs {
            becomes_read_only(lab, old)?;
        }

        lab.heal_all()?;
        match agent {
            Agent::Runs => {}
            Agent::Killed => lab.start_agent(old)?,
            Agent::Stopped => lab.cont_agent(old)?,
        }
        lab.wait_for(&format!("{old} to be back or kept out"), SOON, || {
            if lab.state_of(old)? == "AWAITING_RECOVERY" && !is_kept_out(lab, old)? {
                lab.control(&["set_online", old])?;
            }
            if lab.state_of(old)? == "ONLINE" || is_kept_out(lab, old)? { Ok(()) } else { bail!("it is not") }
        })?;
        becomes_read_only(lab, old)?;
        ensure!(lab.writer()? == new, "the writer went back without being told to");
        nothing_else_is_lost(lab, story, client, watch, &lost).map(drop)
    })
}

#[test]
fn an_isolated_writer_falls_silent_within_its_lease_and_the_other_master_writes() -> Result<()> {
    isolated("isolated", Agent::Runs, true)
}

#[test]
fn an_isolated_writer_without_semisync_loses_only_what_it_acknowledged_while_it_was_alone() -> Result<()> {
    isolated("isolated_without_semisync", Agent::Runs, false)
}

#[test]
fn an_isolated_writer_whose_agent_was_killed_falls_silent_by_the_kernels_hand() -> Result<()> {
    isolated("isolated_agent_killed", Agent::Killed, true)
}

#[test]
fn an_isolated_writer_whose_agent_was_stopped_falls_silent_by_the_kernels_hand() -> Result<()> {
    isolated("isolated_agent_stopped", Agent::Stopped, true)
}

#[test]
fn an_agent_that_comes_back_at_once_costs_nothing_and_one_that_stays_away_costs_the_roles() -> Result<()> {
    with_cluster(|lab| {
        let old = lab.writer()?;
        nothing_moves(lab, "agent_killed_and_restarted_5_times", || {
            for _ in 0..5 {
                let killed = Instant::now();
                lab.kill_agent(old)?;
                std::thread::sleep(Duration::from_millis(500));
                lab.start_agent(old)?;
                ensure!(killed.elapsed() < Duration::from_secs(1), "this machine is too slow for this story");
                // The kernel's lifetimes of the process before are over by then.
                std::thread::sleep(LEASE);
            }
            Ok(())
        })?;

        let story = "agent_killed_for_good";
        let (new, (client, watch)) = (other_master(old), writing(lab)?);
        let killed = Instant::now();
        lab.kill_agent(old)?;
        let gone = until_gone(lab, old, killed)?;
        let wrote = first_write_on(lab, new, &client)?.ended.saturating_duration_since(killed);
        figure(story, "addresses_gone_from_the_kernel", gone);
        figure(story, "other_master_writes", wrote);
        ensure!(gone <= LEASE + MARGIN + Duration::from_secs(1), "the addresses left only after {gone:?}");
        ensure!(wrote <= LEASE + Duration::from_millis(2500) + PATIENCE, "{new} wrote only after {wrote:?}");
        let found = client.journal().verify(&lab.socket(new))?;
        ensure!(found.is_right(), "on {new}: {found:?}");
        lab.start_agent(old)?;
        lab.wait_for(&format!("{old} to be back or kept out"), SOON, || {
            if is_kept_out(lab, old)? { Ok(()) } else { lab.wait_back_online(old, Duration::from_secs(1)) }
        })?;
        becomes_read_only(lab, old)?;
        nothing_is_lost_and_nothing_was_doubled(lab, story, client, watch).map(drop)
    })
}

// ---- faults that must move nothing -----------------------------------------------------------------------------------

/// When `story` happens; then no address moves, leaves or comes, every host stays ONLINE, and the client does not
/// notice.
fn nothing_moves(lab: &Lab, name: &str, story: impl FnOnce() -> Result<()>) -> Result<()> {
    let places = || DB.into_iter().map(|h| roles_of(lab, h)).collect::<Result<Vec<_>>>();
    // The last host to come ONLINE is given its share a moment later: that is no move of this story's.
    lab.wait_for("a reader address on every host", SOON, || {
        for (host, roles) in DB.into_iter().zip(places()?) {
            ensure!(roles.iter().any(|ip| *ip != WRITER), "{host} has {roles:?}");
        }
        Ok(())
    })?;
    let before = places()?;
    let (client, watch) = writing(lab)?;
    let since = Instant::now();
    story()?;
    let until = client.wait_write(Instant::now(), SOON)?;
    let gap = client.journal().outage(since, until).length();
    figure(name, "longest_gap_between_acknowledged_writes", gap);
    lab.wait_for("every host ONLINE", SOON, || {
        for host in DB {
            ensure!(lab.state_of(host)? == "ONLINE", "{host} is {}", lab.state_of(host)?);
        }
        Ok(())
    })?;
    let after = places()?;
    let seen = nothing_is_lost_and_nothing_was_doubled(lab, name, client, watch)?;
    ensure!(seen.writer_moves.len() == 1, "{name}: the writer address was moved: {}", seen.writer_moves.join(", "));
    ensure!(before == after, "{name}: {before:?} became {after:?}");
    ensure!(gap < NO_OUTAGE, "{name}: no write was acknowledged for {gap:?}");
    Ok(())
}

/// Longer than a lease and the margin: whatever was broken has shown by then.
fn quiet_time() {
    std::thread::sleep(LEASE + MARGIN + Duration::from_secs(2));
}

#[test]
fn without_a_monitor_and_through_restarts_and_upgrades_nobody_notices() -> Result<()> {
    with_cluster(|lab| {
        nothing_moves(lab, "monitor_dead_for_60_s", || {
            lab.kill_monitor()?;
            std::thread::sleep(Duration::from_secs(60));
            lab.start_monitor()?;
            quiet_time();
            Ok(())
        })?;
        nothing_moves(lab, "upgrade", || {
            for (n, host) in DB.into_iter().enumerate() {
                let agent = running(lab, host, "mmm_agentd")?;
                agent.signal(Signal::SIGUSR2)?;
                agent.wait_gone(Duration::from_secs(2))?;
                if n == 1 {
                    lab.end_monitor()?;
                    lab.start_monitor()?;
                }
                lab.start_agent(host)?;
                std::thread::sleep(Duration::from_millis(500));
            }
            quiet_time();
            Ok(())
        })?;
        nothing_moves(lab, "both_masters_agents_and_monitor_restarted_at_once", || {
            let began = Instant::now();
            lab.kill_monitor()?;
            lab.kill_agent("db1")?;
            lab.kill_agent("db2")?;
            lab.start_agent("db1")?;
            lab.start_agent("db2")?;
            lab.start_monitor()?;
            println!("killed and started again within {:?}", began.elapsed());
            ensure!(began.elapsed() < Duration::from_secs(1), "this machine is too slow for this story");
            quiet_time();
            Ok(())
        })
    })
}

#[test]
fn a_monitor_that_cannot_reach_the_writer_leaves_it_alone_and_says_why() -> Result<()> {
    with_cluster(|lab| {
        let writer = lab.writer()?;
        nothing_moves(lab, "monitor_cut_from_the_writer_for_30_s", || {
            let cut = Instant::now();
            lab.cut_both(MONITOR, writer)?;
            let reason = lab.wait_for("the reason in `show`", SOON, || {
                let shown = show(lab)?;
                let line = shown.lines().find(|l| l.contains(writer) && l.contains("seen by")).map(str::to_owned);
                line.with_context(|| format!("no line says that {writer} is seen by another host"))
            })?;
            println!("after {:?}: {reason}", cut.elapsed());
            figure("monitor_cut_from_the_writer_for_30_s", "shown_with_its_reason", cut.elapsed());
            stays("the writer", Duration::from_secs(30).saturating_sub(cut.elapsed()), || {
                ensure!(lab.writer()? == writer);
                Ok(())
            })?;
            ensure!(show(lab)?.contains("seen by"), "the reason is gone from `show`:\n{}", show(lab)?);
            lab.heal_all()?;
            quiet_time();
            lab.wait_for("`show` without the reason", SOON, || {
                let shown = show(lab)?;
                if shown.contains("seen by") { bail!("{shown}") } else { Ok(()) }
            })
        })?;
        footprint::check(lab)?;
        let recorded = forger::record(lab)?;
        nothing_moves(lab, "bad_input", || forger::attack(lab, &recorded))
    })
}

// ---- somebody else's machine -----------------------------------------------------------------------------------------

#[test]
fn a_foreign_machine_with_the_writer_address_is_named_and_waited_for_unless_there_is_proof() -> Result<()> {
    /// It does not take the address for so long after it might have.
    const HELD_BACK: Duration = Duration::from_secs(10);
    with_cluster(|lab| {
        let story = "foreign_machine";
        let stranger = Stranger::join(lab)?;
        let mac = stranger.mac()?.to_string();
        let named = |what: &str| {
            lab.wait_for(what, SOON, || {
                let shown = show(lab)?;
                let line = shown.lines().find(|l| l.contains(&mac) && l.contains(&WRITER.to_string()));
                line.map(str::to_owned).with_context(|| format!("no line names {mac}"))
            })
        };

        // With proof: the old writer has said that it is off.
        let (first, watch) = (lab.writer()?, lab.watch()?);
        let second = other_master(first);
        stranger.take_address(WRITER)?;
        let asked = Instant::now();
        lab.must_control(&["move_role", "writer", second])?;
        figure(story, "planned_move_while_it_answers", asked.elapsed());
        ensure!(lab.writer()? == second, "the planned move did not go on");
        println!("{story}: {}", named("the foreign machine in `show` after a planned move")?);
        let said = log_of(lab, second, "mmm_agentd")?;
        // Which of the two depends on who was quicker, the answer or the kernel.
        let words = ["taken all the same", "the other has no right to it"];
        let tells = |l: &str| l.contains("ERROR") && l.contains(&mac) && words.iter().any(|w| l.contains(w));
        let loud = said.lines().find(|l| tells(l));
        ensure!(loud.is_some(), "{second} took the address from under {mac} in silence");
        stranger.give_up_address(WRITER)?;
        lab.wait_for("`show` without the foreign machine", SOON, || {
            let shown = show(lab)?;
            if shown.contains(&mac) { bail!("{shown}") } else { Ok(()) }
        })?;
        lab.wait_serving(SOON)?;
        watch.finish()?;

        // Without: the writer's agent is dead, and its lease has to be waited out.
        let (client, watch) = writing(lab)?;
        stranger.take_address(WRITER)?;
        let killed = Instant::now();
        lab.kill_agent(second)?;
        let gone = until_gone(lab, second, killed)?;
        figure(story, "addresses_gone_after_the_agents_death", gone);
        println!("{story}: {}", named("the foreign machine in `show` after the writer's death")?);
        let until = killed + LEASE + MARGIN + HELD_BACK;
        stays("the writer address on no host", until.saturating_duration_since(Instant::now()), || {
            let holders = lab.holders(WRITER.into())?;
            ensure!(holders.is_empty(), "{holders:?} took it though somebody else answers");
            Ok(())
        })?;
        let given_up = Instant::now();
        stranger.give_up_address(WRITER)?;
        lab.wait_for(&format!("{first} to write"), SOON, || match lab.writer()? {
            host if host == first => Ok(()),
            host => bail!("{host} is the writer"),
        })?;
        figure(story, "taken_after_it_fell_silent", given_up.elapsed());
        client.wait_write(given_up, SOON)?;
        let found = client.journal().verify(&lab.socket(first))?;
        ensure!(found.is_right(), "on {first}: {found:?}");
        lab.start_agent(second)?;
        lab.wait_for(&format!("{second} to be back or kept out"), SOON, || {
            if is_kept_out(lab, second)? { Ok(()) } else { lab.wait_back_online(second, Duration::from_secs(1)) }
        })?;
        nothing_is_lost_and_nothing_was_doubled(lab, story, client, watch).map(drop)
    })
}
