//! The tour of `contrib/demo`: a cluster, a client that writes all the time, and what it notices while the writer is
//! moved, killed and cut off. The first thing a user sees, so it stays calm, and every number in it is measured.

use super::client::{Client, ClientConfig};
use super::network::{APP, DB, WRITER};
use super::server::Dialect;
use super::{Lab, LabConfig, wait_for};
use anyhow::{Result, bail};
use std::io::Write as _;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(60);

/// Everything is taken down at the end, unless `stay`.
pub fn run(id: Option<String>, server: String, stay: bool) -> Result<()> {
    let mut lab = Lab::run_and_keep(LabConfig { id, server, print_logs: false, ..LabConfig::default() }, tour)?;
    if !stay {
        say("\nTaking everything down.");
        return lab.down();
    }
    lab.leave_standing()?;
    let me = std::env::current_exe().map_or("mmm-lab".to_owned(), |p| p.display().to_string());
    say(&format!("\nLab {} stays up. Talk to it:\n", lab.id()));
    for (what, verb) in [
        ("what runs where", "status"),
        ("any mmm_control verb", "control show"),
        ("a client that prints outages", "client"),
        ("a shell on a host", "exec db1 bash"),
        ("faults", "kill-mysqld db1 | start-mysqld db1 | link-down db1 | link-up db1 | cut db1 db2"),
        ("take it down", "down"),
    ] {
        say(&format!("  {what:<30} {me} {verb}"));
    }
    say(&format!("\n  logs and configuration         {}", lab.dir().display()));
    Ok(())
}

fn tour(lab: &Lab) -> Result<()> {
    let product = match lab.server().dialect {
        Dialect::MariaDb => "MariaDB",
        Dialect::MySql => "MySQL",
    };
    say("\nMMM: three real database servers in network namespaces of this machine\n");
    say(&format!("  server    {product} {}, semi-synchronous between the masters db1 and db2", lab.server().version));
    say(&format!("  hosts     {} with mmm_agentd, mon with mmm_mond, {APP} with a client", DB.join(", ")));
    say(&format!("  lab       {}, folder {}\n", lab.id(), lab.dir().display()));
    say("A new cluster waits for the operator: set_online db1, db2, db3.\n");
    lab.bring_online()?;
    show(lab)?;

    let client = lab.client(ClientConfig::default())?;
    wait_for("the client's first writes", SOON, || match client.journal().acknowledged().count() {
        50.. => Ok(()),
        n => bail!("{n} acknowledged; {:?}", client.journal().troubles(Instant::now() - SOON)),
    })?;
    say(&format!(
        "\nA client writes a row every 20 ms to the writer address {WRITER}. A call that takes longer than 0.5 s is\n\
         given up. An outage is the longest time between two acknowledged writes; a write is lost when it was\n\
         acknowledged and is not on the new writer.\n"
    ));
    say(&format!("  {:<44} {:<12} {:>12}   {}", "what happens", "writer", "write outage", "lost writes"));
    say(&format!("  {}", "-".repeat(88)));

    let (first, second) = (lab.writer()?, other_master(lab)?);
    row(lab, &client, &format!("move_role writer {second}"), || {
        lab.must_control(&["move_role", "writer", second]).map(drop)
    })?;
    let dead = lab.writer()?;
    row(lab, &client, &format!("kill -9 the server of the writer, {dead}"), || {
        lab.kill_mysqld(dead)?;
        new_writer(lab, dead)
    })?;
    row(lab, &client, &format!("start it again; {dead} comes back as a replica"), || {
        lab.start_mysqld(dead)?;
        comes_back(lab, dead)
    })?;
    if let Some(why) = kept_out(lab, dead)? {
        return stays_out(lab, client, dead, &why);
    }
    let cut = lab.writer()?;
    row(lab, &client, &format!("take the cable of the writer, {cut}, out"), || {
        lab.link_down(cut)?;
        new_writer(lab, cut)
    })?;
    row(lab, &client, &format!("put it in again; {cut} comes back as a replica"), || {
        lab.link_up(cut)?;
        comes_back(lab, cut)
    })?;
    if let Some(why) = kept_out(lab, cut)? {
        return stays_out(lab, client, cut, &why);
    }
    if lab.writer()? != first {
        row(lab, &client, &format!("move_role writer {first}"), || {
            lab.must_control(&["move_role", "writer", first]).map(drop)
        })?;
    }

    summary(lab, client, &DB)
}

/// What every one of these hosts has in the end.
fn summary(lab: &Lab, client: Client, hosts: &[&str]) -> Result<()> {
    let journal = client.finish();
    say(&format!(
        "\nThe client is ended. {} writes were acknowledged; on the hosts are now:\n",
        journal.acknowledged().count()
    ));
    for host in hosts {
        let found = wait_for(&format!("{host} to catch up"), SOON, || {
            let found = journal.verify(&lab.socket(host))?;
            if found.missing.is_empty() { Ok(found) } else { bail!("{} writes are missing", found.missing.len()) }
        })?;
        let there = found.acknowledged - found.missing.len();
        say(&format!("  {host}  {there} of {}, {} doubled", found.acknowledged, found.duplicates.len()));
    }
    say("");
    show(lab)
}

/// ONLINE again and replicating, or kept out for a reason that `show` tells.
fn comes_back(lab: &Lab, host: &str) -> Result<()> {
    lab.wait_for(&format!("{host} to come back"), SOON, || {
        if kept_out(lab, host)?.is_some() {
            return Ok(());
        }
        lab.wait_back_online(host, Duration::from_millis(600))?;
        lab.wait_serving(SOON).map(drop)
    })
}

/// The line of `show` that says why a host that is back is not taken in.
fn kept_out(lab: &Lab, host: &str) -> Result<Option<String>> {
    let show = lab.must_control(&["show"])?.text;
    let line = show.lines().find(|line| line.starts_with(&format!("# Warning: host {host} has ")));
    Ok(line.map(str::to_owned))
}

/// The old master has written something that nobody else has, which happens when it was cut off in the middle of a
/// commit. The tour ends here: taking such a host in again is the operator's decision.
fn stays_out(lab: &Lab, client: Client, host: &str, why: &str) -> Result<()> {
    say(&format!(
        "\n  {host} was cut off in the middle of a commit that nobody else has and that was never acknowledged."
    ));
    say(&format!("  It is kept out, and nothing is merged or thrown away:\n\n  {why}"));
    let others: Vec<&str> = DB.into_iter().filter(|h| *h != host).collect();
    summary(lab, client, &others)
}

/// Does one thing, and prints what the client noticed of it.
fn row(lab: &Lab, client: &Client, what: &str, act: impl FnOnce() -> Result<()>) -> Result<()> {
    print!("  {what:<44} ");
    let _ = std::io::stdout().flush();
    let noticed = notice(lab, client, act);
    say(noticed.as_ref().map_or("failed", String::as_str));
    noticed.map(drop)
}

/// The rest of the line: writer, outage, lost writes.
fn notice(lab: &Lab, client: &Client, act: impl FnOnce() -> Result<()>) -> Result<String> {
    let before = lab.writer()?;
    let began = Instant::now();
    act()?;
    let until = client.wait_write(Instant::now(), SOON)?;
    let after = lab.writer()?;
    let journal = client.journal();
    let outage = journal.outage(began, until).length();
    let found = journal.verify(&lab.socket(after))?;
    let writer = if before == after { after.to_owned() } else { format!("{before} -> {after}") };
    Ok(format!("{writer:<12} {:>10.3} s   {} of {}", outage.as_secs_f64(), found.missing.len(), found.acknowledged))
}

/// Waits until another host than `old` is the writer.
fn new_writer(lab: &Lab, old: &str) -> Result<()> {
    lab.wait_for(&format!("another writer than {old}"), SOON, || {
        let writer = lab.writer()?;
        if writer == old { bail!("{old} is still the writer") } else { Ok(()) }
    })
}

/// The master that is not the writer.
fn other_master(lab: &Lab) -> Result<&'static str> {
    Ok(if lab.writer()? == "db1" { "db2" } else { "db1" })
}

fn show(lab: &Lab) -> Result<()> {
    say("# mmm_control show");
    say(lab.must_control(&["show"])?.text.trim_end());
    Ok(())
}

fn say(line: &str) {
    println!("{line}");
}
