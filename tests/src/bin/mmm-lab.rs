//! `mmm-lab`: a cluster in network namespaces from the command line. See `contrib/demo` for a first look.

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser, Subcommand};
use mmm_tests::lab::client::ClientConfig;
use mmm_tests::lab::configs::Extra;
use mmm_tests::lab::network::{APP, DB, GATEWAY_IP, READERS, WRITER, hosts, ip_of};
use mmm_tests::lab::{Lab, LabConfig, bench, chaos, data, demo, process, standing_ids, take_down_own};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// A cluster on one machine: hosts in network namespaces with real servers and the real daemons.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    /// Which lab; not needed while there is only one.
    #[arg(long, global = true)]
    id: Option<String>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Bring up a lab and leave it standing.
    Up(Up),
    /// Take a lab down: its processes, its namespaces, its folder.
    Down,
    /// What runs where, and who has which address.
    Status,
    /// Run a command on a host: db1, db2, db3, mon, app.
    Exec {
        host: String,
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Run mmm_control on the monitor's host.
    Control {
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run one SQL statement on a host.
    Mysql { host: String, sql: String },
    /// Write rows through the writer address and print every outage, until Ctrl-C.
    Client {
        /// End by itself after so many seconds.
        #[arg(long)]
        seconds: Option<u64>,
        /// Milliseconds between two writes.
        #[arg(long, default_value_t = 20)]
        period_ms: u64,
    },
    /// kill -9 the server.
    KillMysqld { host: String },
    /// SIGSTOP the server: it hangs.
    StopMysqld { host: String },
    /// SIGCONT the server.
    ContMysqld { host: String },
    /// Shut the server down cleanly.
    ShutDownMysqld { host: String },
    /// Start the server.
    StartMysqld { host: String },
    /// kill -9 the agent.
    KillAgent { host: String },
    /// SIGSTOP the agent.
    StopAgent { host: String },
    /// SIGCONT the agent.
    ContAgent { host: String },
    /// Start the agent.
    StartAgent { host: String },
    /// kill -9 the monitor.
    KillMonitor,
    /// Start the monitor.
    StartMonitor,
    /// Take the host's network cable out.
    LinkDown { host: String },
    /// Put it in again.
    LinkUp { host: String },
    /// Drop what one host sends to another (`gw` is the bridge's own address).
    Cut {
        from: String,
        to: String,
        /// In both directions.
        #[arg(long)]
        both: bool,
    },
    /// End every cut.
    Heal,
    /// A tour: move the writer, kill it, cut it off; each time with the outage a client saw and the writes it lost.
    Demo {
        #[command(flatten)]
        server: ServerChoice,
        /// Leave the lab up at the end.
        #[arg(long)]
        stay: bool,
    },
    /// Measure the write outage of a planned move, a killed and a hanging server and a dead host; every run on a lab of
    /// its own.
    Bench {
        #[command(flatten)]
        server: ServerChoice,
        /// How often each is measured.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Measure only these, by key: move, kill, stop, stop-500ms, cable, cable-1s, cable-300ms, cable-unguarded, reader,
        /// idle.
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
        /// So many rows a second are written by 24 other clients meanwhile.
        #[arg(long, default_value_t = 0)]
        load: u32,
        /// Write everything as JSON as well.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Faults drawn from a seed, one after the other and two at once, while clients write and watchers look at kernels,
    /// servers and the wire. Ends with 0 only if no address was on two hosts, no acknowledged row is lost without an
    /// excuse, and everything serves at the end.
    Chaos(Chaos),
    /// Move, kill or cut off the writer again and again while many clients write, and look for every acknowledged row
    /// on every host after each time. Ends with 0 only if nothing was lost, doubled, different or unexpected.
    Data(Data),
}

#[derive(Args)]
struct Data {
    #[command(flatten)]
    server: ServerChoice,
    /// moves, kills or cuts.
    #[arg(long)]
    work: data::Work,
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Who turns semi-synchronous replication on: file (the servers' own files), lab (by SQL before each run), product,
    /// or off: then what is lost is counted.
    #[arg(long, default_value = "file")]
    semisync: data::SemiSync,
    /// The same as --semisync off.
    #[arg(long, conflicts_with = "semisync")]
    no_semisync: bool,
    /// Rows a second, all clients together; each row is a transaction.
    #[arg(long, default_value_t = 2000)]
    rate: u32,
    #[arg(long, default_value_t = 24)]
    clients: u32,
    /// Sync every commit to disk, on every server.
    #[arg(long)]
    durable: bool,
    /// How the moments of the faults are spread.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A line for mmm_common.toml, e.g. 'auto_reclone = true'.
    #[arg(long)]
    common: Vec<String>,
    /// A line for the section monitor of mmm_mon.toml.
    #[arg(long)]
    monitor: Vec<String>,
    /// A line for the section agent of every mmm_agent.toml.
    #[arg(long)]
    agent: Vec<String>,
    /// Keep the logs of runs with a surprise in this folder instead of one in /tmp.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Write the summary as JSON as well.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Args)]
struct Chaos {
    /// The same seed gives the same faults.
    #[arg(long)]
    seed: Option<u64>,
    /// How long faults go on.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    #[command(flatten)]
    server: ServerChoice,
    /// Clients that write.
    #[arg(long, default_value_t = 4)]
    clients: usize,
    /// Keep timeline, verdict and logs in this folder; without it they are kept in /tmp if something is wrong.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Write the verdict as JSON as well.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Args)]
struct Up {
    #[command(flatten)]
    server: ServerChoice,
    /// Servers and replication only.
    #[arg(long)]
    no_daemons: bool,
    /// Leave the cluster as a new one is: every host AWAITING_RECOVERY.
    #[arg(long)]
    no_online: bool,
}

#[derive(Args)]
struct ServerChoice {
    /// mariadb, mariadb-10.11, mariadb-11.8, mysql-9.7, or the path of an unpacked server.
    #[arg(long, default_value = "mariadb")]
    server: String,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if matches!(cli.verb, Verb::Up(_) | Verb::Demo { .. } | Verb::Bench { .. } | Verb::Chaos(_) | Verb::Data(_)) {
        take_down_when_told_to_end();
    }
    let result = act(cli);
    if process::starts_are_forbidden() {
        // Another thread takes the lab down and then ends the process; what failed meanwhile failed because of that.
        thread::sleep(Duration::from_secs(120));
    }
    match result {
        Ok(code) => code,
        Err(e) => {
            eprintln!("mmm-lab: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(cli: Cli) -> Result<ExitCode> {
    let id = cli.id.as_deref();
    match cli.verb {
        Verb::Up(up) => return bring_up(cli.id, up),
        Verb::Demo { server, stay } => return demo::run(cli.id, server.server, stay).map(|()| ExitCode::SUCCESS),
        Verb::Bench { server, runs, only, load, json } => {
            return bench::run(&server.server, runs, &only, load, json.as_deref()).map(|()| ExitCode::SUCCESS);
        }
        Verb::Chaos(asked) => return chaos(asked),
        Verb::Data(asked) => return prove_data(asked),
        Verb::Down => {
            let lab = Lab::attach(id)?;
            let id = lab.id().to_owned();
            lab.down()?;
            println!("Lab {id} is gone.");
        }
        Verb::Status => status(&Lab::attach(id)?)?,
        Verb::Exec { host, command } => {
            ip_of(&host)?;
            return exec(&Lab::attach(id)?, &host, &command);
        }
        Verb::Control { args } => {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let output = Lab::attach(id)?.control(&args)?;
            print!("{}", output.text);
            return Ok(ExitCode::from(u8::try_from(output.code).unwrap_or(1)));
        }
        Verb::Mysql { host, sql } => {
            let table = Lab::attach(id)?.mysql(&host, &sql)?;
            println!("{}", table.columns.join("\t"));
            for row in table.rows {
                let row: Vec<String> = row.into_iter().map(|v| v.unwrap_or_else(|| "NULL".to_owned())).collect();
                println!("{}", row.join("\t"));
            }
        }
        Verb::Client { seconds, period_ms } => client(&Lab::attach(id)?, seconds, Duration::from_millis(period_ms))?,
        Verb::KillMysqld { host } => Lab::attach(id)?.kill_mysqld(&host)?,
        Verb::StopMysqld { host } => Lab::attach(id)?.stop_mysqld(&host)?,
        Verb::ContMysqld { host } => Lab::attach(id)?.cont_mysqld(&host)?,
        Verb::ShutDownMysqld { host } => Lab::attach(id)?.shut_down_mysqld(&host)?,
        Verb::StartMysqld { host } => Lab::attach(id)?.start_mysqld(&host)?,
        Verb::KillAgent { host } => Lab::attach(id)?.kill_agent(&host)?,
        Verb::StopAgent { host } => Lab::attach(id)?.stop_agent(&host)?,
        Verb::ContAgent { host } => Lab::attach(id)?.cont_agent(&host)?,
        Verb::StartAgent { host } => Lab::attach(id)?.start_agent(&host)?,
        Verb::KillMonitor => Lab::attach(id)?.kill_monitor()?,
        Verb::StartMonitor => Lab::attach(id)?.start_monitor()?,
        Verb::LinkDown { host } => Lab::attach(id)?.link_down(&host)?,
        Verb::LinkUp { host } => Lab::attach(id)?.link_up(&host)?,
        Verb::Cut { from, to, both } => {
            let lab = Lab::attach(id)?;
            if both { lab.cut_both(&from, &to)? } else { lab.cut(&from, &to)? }
        }
        Verb::Heal => Lab::attach(id)?.heal_all()?,
    }
    Ok(ExitCode::SUCCESS)
}

fn bring_up(id: Option<String>, up: Up) -> Result<ExitCode> {
    let began = Instant::now();
    let mut lab = Lab::up(LabConfig {
        id,
        server: up.server.server,
        daemons: !up.no_daemons,
        print_logs: false,
        ..LabConfig::default()
    })?;
    if !up.no_daemons && !up.no_online {
        lab.bring_online()?;
    }
    lab.leave_standing()?;
    println!("Lab {} is up after {:.1} s.\n", lab.id(), began.elapsed().as_secs_f64());
    status(&lab)?;
    println!("\nTalk to it:   mmm-lab status | control show | client | exec db1 ip addr | --help");
    println!("Take it down: mmm-lab down");
    Ok(ExitCode::SUCCESS)
}

fn chaos(asked: Chaos) -> Result<ExitCode> {
    let seed = asked.seed.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::from(now.subsec_nanos()) ^ now.as_secs()
    });
    if !(0.0..=24.0 * 60.0).contains(&asked.minutes) {
        bail!("--minutes {} is not between 0 and a day", asked.minutes);
    }
    let config = chaos::Config {
        server: asked.server.server,
        clients: asked.clients,
        dir: asked.dir,
        ..chaos::Config::new(seed, Duration::from_secs_f64(asked.minutes * 60.0))
    };
    let verdict = chaos::run(&config)?;
    if let Some(file) = asked.json {
        std::fs::write(&file, serde_json::to_vec_pretty(&verdict)?)
            .with_context(|| format!("write {}", file.display()))?;
    }
    Ok(if verdict.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn prove_data(asked: Data) -> Result<ExitCode> {
    let mut config = data::Config::new(&asked.server.server, asked.work, asked.runs);
    config.semisync = if asked.no_semisync { data::SemiSync::Off } else { asked.semisync };
    config.durable = asked.durable;
    config.load.rate = asked.rate;
    config.load.clients = asked.clients;
    config.seed = asked.seed;
    config.extra = Extra { common: asked.common, monitor: asked.monitor, agent: asked.agent };
    config.dir = asked.dir;
    let summary = data::run(&config)?;
    if let Some(file) = asked.json {
        std::fs::write(&file, serde_json::to_vec_pretty(&summary)?)
            .with_context(|| format!("write {}", file.display()))?;
    }
    Ok(if summary.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn status(lab: &Lab) -> Result<()> {
    println!("Lab {} in {}, server {}", lab.id(), lab.dir().display(), lab.server().version);
    println!("\n  {:<6} {:<14} {:<62} addresses", "host", "own address", "programs (pid)");
    for host in hosts() {
        let running = lab.running();
        let programs: Vec<String> = running
            .iter()
            .filter(|(on, ..)| *on == host)
            .map(|(_, program, pid)| match pid {
                Some(pid) => format!("{program} ({pid})"),
                None => format!("{program} (DOWN)"),
            })
            .collect();
        let there = lab.network().addresses(host)?;
        let roles: Vec<String> = [WRITER]
            .iter()
            .map(|ip| ("writer", *ip))
            .chain(READERS.iter().map(|ip| ("reader", *ip)))
            .filter(|(_, ip)| there.contains(&(*ip).into()))
            .map(|(role, ip)| format!("{role}({ip})"))
            .collect();
        println!("  {host:<6} {:<14} {:<62} {}", ip_of(host)?, programs.join(", "), roles.join(", "));
    }
    println!("  {:<6} {GATEWAY_IP}", "gw");
    for (from, to) in lab.network().cuts() {
        println!("  cut: {from} -> {to}");
    }
    if lab.has_daemons() {
        println!("\nmmm_control show\n{}", lab.control(&["show"])?.text.trim_end());
    }
    Ok(())
}

/// With the terminal's input and output, so that an interactive client works.
fn exec(lab: &Lab, host: &str, command: &[String]) -> Result<ExitCode> {
    let (program, args) = command.split_first().context("no command")?;
    let status = process::within(&lab.network().netns(host), || Command::new(program).args(args).status())?
        .with_context(|| format!("run {program} on {host}"))?;
    Ok(ExitCode::from(status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(1)))
}

fn client(lab: &Lab, seconds: Option<u64>, period: Duration) -> Result<()> {
    /// Shorter gaps are the ordinary jitter of a shared machine.
    const WORTH_A_LINE: Duration = Duration::from_millis(200);
    let ended = when_told_to_end();
    let began = Instant::now();
    let client = lab.client(ClientConfig { period, ..ClientConfig::default() })?;
    println!("Writing from '{APP}' to {WRITER}, a row every {period:?}. Ctrl-C ends it.");
    let mut reported = began;
    let mut down = false;
    loop {
        let told = ended.recv_timeout(Duration::from_millis(100)).is_ok();
        let now = Instant::now();
        let journal = client.journal();
        let last = journal.acknowledged().last().map_or(began, |w| w.ended);
        if !down && now - last > WORTH_A_LINE {
            down = true;
            println!("{:>8.2} s  no write is acknowledged any more", (last - began).as_secs_f64());
        }
        let outage = journal.outage(reported, now);
        if outage.until < now || last >= outage.until {
            if outage.length() > WORTH_A_LINE && last > outage.from {
                down = false;
                println!(
                    "{:>8.2} s  writes again; the outage was {:.3} s",
                    (outage.until - began).as_secs_f64(),
                    outage.length().as_secs_f64()
                );
            }
            reported = last;
        }
        if told || seconds.is_some_and(|s| began.elapsed() >= Duration::from_secs(s)) {
            break;
        }
    }
    let journal = client.finish();
    let all = journal.outage(began, Instant::now());
    println!(
        "\n{} writes acknowledged, longest outage {:.3} s, calls at their time limit: {}",
        journal.acknowledged().count(),
        all.length().as_secs_f64(),
        journal.timeouts(began).all()
    );
    for (why, times) in journal.troubles(began) {
        println!("  {times:>5} x {why}");
    }
    for host in DB {
        match journal.verify(&lab.socket(host)) {
            Ok(found) => println!(
                "  {host}: {} acknowledged writes missing, {} doubled",
                found.missing.len(),
                found.duplicates.len()
            ),
            Err(e) => println!("  {host}: cannot be compared: {e:#}"),
        }
    }
    Ok(())
}

/// Sends once when this process gets SIGINT or SIGTERM.
fn when_told_to_end() -> mpsc::Receiver<()> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
            tokio::select! {
                said = tokio::signal::ctrl_c() => said?,
                _ = terminate.recv() => {}
            }
            Ok::<(), std::io::Error>(())
        })?;
        if send.send(()).is_err() {
            bail!("nobody waits for the signal any more");
        }
        Ok(())
    });
    receive
}

fn take_down_when_told_to_end() {
    let ended = when_told_to_end();
    thread::spawn(move || {
        if ended.recv().is_ok() {
            eprintln!("\nInterrupted; taking the lab down.");
            take_down_own();
            if !standing_ids().is_empty() {
                eprintln!("Labs of others stand: {}", standing_ids().join(", "));
            }
            std::process::exit(130);
        }
    });
}
