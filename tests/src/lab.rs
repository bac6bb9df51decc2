//! The lab: a whole cluster on one machine. Database hosts db1, db2 (masters of each other) and db3 (replica of db1),
//! the monitor's host `mon` and the clients' host `app`, each in a network namespace of its own, with real servers, the
//! real daemons, and faults on request.
//!
//! It touches nothing outside: every name carries the lab's id, the bridge has its own namespace, and only processes
//! inside the lab's namespaces are ever ended. A [`Lab`] takes everything down when it is dropped; a lab that
//! `mmm-lab up` has left standing is found again by its folder, /tmp/mmm-lab-ID.

pub mod bench;
pub mod chaos;
pub mod client;
pub mod configs;
pub mod data;
pub mod demo;
pub mod load;
pub mod network;
pub mod process;
pub mod server;
pub mod watch;

use anyhow::{Context as _, Result, anyhow, bail};
use client::{Client, ClientConfig};
use configs::Extra;
use load::{Load, LoadConfig};
use network::{DB, MONITOR, Network, READERS, WRITER};
use nix::sys::signal::Signal;
use process::{Output, Running, Start};
use serde::{Deserialize, Serialize};
use server::{Server, Settings, Sides, Table};
use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use watch::Watch;

const STATE: &str = "state.json";
const FOLDERS: &str = "/tmp/mmm-lab-";

#[derive(Clone, Debug)]
pub struct LabConfig {
    /// None: one that nobody has.
    pub id: Option<String>,
    /// What [`Server::find`] understands: `mariadb`, `mariadb-11.8`, `mysql-9.7`, a path.
    pub server: String,
    /// Replication by GTID; false, MySQL only: by file and position.
    pub gtids: bool,
    /// Start `mmm_agentd` on every database host and `mmm_mond` on `mon`.
    pub daemons: bool,
    pub semisync: bool,
    pub sides: Sides,
    pub durable: bool,
    /// The daemons' RUST_LOG.
    pub log: String,
    pub extra: Extra,
    /// Print the ends of all logs when something fails; otherwise only their place.
    pub print_logs: bool,
}

impl Default for LabConfig {
    fn default() -> Self {
        LabConfig {
            id: None,
            server: std::env::var("MMM_LAB_SERVER").unwrap_or_else(|_| "mariadb".to_owned()),
            gtids: true,
            daemons: true,
            semisync: true,
            sides: Sides::InFile,
            durable: true,
            log: "info".to_owned(),
            extra: Extra::default(),
            print_logs: true,
        }
    }
}

/// What a later `mmm-lab` call must know. It does not change while the lab stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    id: String,
    /// Takes the lab down when it ends; None: the lab stands until `mmm-lab down`.
    owner: Option<Running>,
    server: Server,
    daemons: bool,
    bin_dir: Option<PathBuf>,
    log: String,
}

pub struct Lab {
    dir: PathBuf,
    state: State,
    network: Network,
    /// Taken down on drop.
    owned: bool,
    /// Logs stay after that.
    keep_logs: bool,
    print_logs: bool,
}

impl Lab {
    /// Brings up namespaces, servers with running replication, and the daemons. Nothing of it is left if that fails,
    /// except the logs; their ends and their place are printed.
    pub fn up(config: LabConfig) -> Result<Lab> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the lab makes network namespaces and needs root");
        }
        for tool in ["ip", "nft"] {
            let mut version = Command::new(tool);
            version.arg("-V");
            process::run(None, version, Duration::from_secs(5))
                .with_context(|| format!("the lab needs `{tool}`; on Debian: apt-get install iproute2 nftables"))?;
        }
        sweep();
        let server = Server::find(&config.server)?;
        let server = if config.gtids { server } else { server.without_gtids()? };
        server.template()?;
        let bin_dir = if config.daemons { Some(bin_dir()?) } else { None };
        let (id, dir) = claim(config.id)?;
        let network = Network::new(&id, &dir);
        let state = State { id, owner: Running::myself(), server, daemons: config.daemons, bin_dir, log: config.log };
        fs::write(dir.join(STATE), serde_json::to_vec_pretty(&state)?)?;
        let mut lab = Lab { dir, state, network, owned: true, keep_logs: false, print_logs: config.print_logs };
        let settings = Settings { semisync: config.semisync, sides: config.sides, durable: config.durable };
        if let Err(e) = lab.raise(settings, &config.extra) {
            lab.keep_logs = true;
            return Err(e.context("bring up the lab"));
        }
        Ok(lab)
    }

    fn raise(&self, settings: Settings, extra: &Extra) -> Result<()> {
        self.network.up()?;
        fs::create_dir_all(self.dir.join(MONITOR))?;
        on_each(DB, |host| {
            let dir = self.dir.join(host);
            fs::create_dir_all(&dir)?;
            self.state.server.prepare(host, &dir, settings)?;
            self.start_mysqld(host)
        })?;
        on_each(DB, |host| self.state.server.follow(&self.socket(host), if host == "db1" { "db2" } else { "db1" }))?;
        for host in DB {
            wait_for(&format!("replication of {host}"), Duration::from_secs(15), || self.replicates(host))?;
        }
        configs::write(&self.dir, extra)?;
        if self.state.daemons {
            for host in DB {
                self.start_helper(host)?;
                self.start_agent(host)?;
            }
            self.start_monitor()?;
            wait_for("an answer of mmm_mond to `mmm_control ping`", Duration::from_secs(15), || {
                let answer = self.control(&["ping"])?;
                if answer.ok() { Ok(()) } else { Err(anyhow!("{}", answer.text.trim())) }
            })?;
        }
        Ok(())
    }

    /// A standing lab, by its id; None: the only one there is. It stays when this value is dropped.
    pub fn attach(id: Option<&str>) -> Result<Lab> {
        let standing = standing();
        let state = match (id, standing.as_slice()) {
            (Some(id), all) => {
                let found = all.iter().find(|s| s.id == id).cloned();
                found.with_context(|| format!("there is no lab {id}; start one with `mmm-lab up --id {id}`"))?
            }
            (None, [only]) => only.clone(),
            (None, []) => bail!("no lab is up; start one with `mmm-lab up`"),
            (None, all) => {
                let ids: Vec<&str> = all.iter().map(|s| s.id.as_str()).collect();
                bail!("several labs are up, choose one with --id: {}", ids.join(", "))
            }
        };
        let dir = folder(&state.id);
        let network = Network::new(&state.id, &dir);
        Ok(Lab { dir, state, network, owned: false, keep_logs: false, print_logs: false })
    }

    /// Leaves the lab standing when this process ends.
    pub fn leave_standing(&mut self) -> Result<()> {
        self.owned = false;
        self.state.owner = None;
        fs::write(self.dir.join(STATE), serde_json::to_vec_pretty(&self.state)?)?;
        Ok(())
    }

    /// Runs a test in a fresh lab. When it fails (an error or a panic) the logs stay; their ends and their place are
    /// printed.
    pub fn run(config: LabConfig, test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
        Lab::run_and_keep(config, test)?.down()
    }

    /// Like [`Lab::run`], and gives the lab back, still up, when the test has succeeded.
    pub fn run_and_keep(config: LabConfig, test: impl FnOnce(&Lab) -> Result<()>) -> Result<Lab> {
        let mut lab = Lab::up(config)?;
        if let Err(e) = test(&lab) {
            lab.keep_logs = true;
            return Err(e);
        }
        Ok(lab)
    }

    /// Ends every process in the lab's namespaces, removes the namespaces and the folder.
    pub fn down(mut self) -> Result<()> {
        self.owned = false;
        tear_down(&self.dir, &self.network, self.keep_logs)
    }

    pub fn id(&self) -> &str {
        &self.state.id
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn network(&self) -> &Network {
        &self.network
    }

    pub fn server(&self) -> &Server {
        &self.state.server
    }

    pub fn has_daemons(&self) -> bool {
        self.state.daemons
    }

    // ---- the operator --------------------------------------------------------------------------------------------

    /// `mmm_control` on the monitor's host. Ten seconds more than its slowest verb may take, then it is killed.
    pub fn control(&self, args: &[&str]) -> Result<Output> {
        let mut command = Command::new(self.program("mmm_control")?);
        command.arg("-c").arg(configs::monitor_file(&self.dir)).args(args);
        process::run(Some(&self.network.netns(MONITOR)), command, Duration::from_secs(60))
    }

    /// Like [`Lab::control`], where anything but success is an error.
    pub fn must_control(&self, args: &[&str]) -> Result<Output> {
        let output = self.control(args)?;
        if !output.ok() {
            bail!("`mmm_control {}` ended with {}: {}", args.join(" "), output.code, output.text.trim());
        }
        Ok(output)
    }

    /// Runs any command on a host.
    pub fn exec(&self, host: &str, command: Command, limit: Duration) -> Result<Output> {
        network::ip_of(host)?;
        process::run(Some(&self.network.netns(host)), command, limit)
    }

    /// `set_online` for every host, then waits until the cluster serves: one writable writer, every address placed,
    /// every replica replicating. Gives the writer.
    pub fn bring_online(&self) -> Result<&'static str> {
        for host in DB {
            wait_for(&format!("`set_online {host}`"), Duration::from_secs(20), || {
                self.must_control(&["set_online", host]).map(drop)
            })?;
        }
        self.wait_serving(Duration::from_secs(30))
    }

    /// Waits until there is one writable writer, every address is placed, and every other host replicates.
    pub fn wait_serving(&self, limit: Duration) -> Result<&'static str> {
        self.wait_for("a cluster that serves", limit, || self.serving())
    }

    /// The host's state as `show` has it, e.g. `ONLINE`.
    pub fn state_of(&self, host: &str) -> Result<String> {
        let shown = self.must_control(&["show"])?.text;
        state_in(&shown, host).with_context(|| format!("`show` has no state of {host}:\n{shown}"))
    }

    pub fn wait_state(&self, host: &str, wanted: &str, limit: Duration) -> Result<()> {
        self.wait_for(&format!("{host} to be {wanted}"), limit, || {
            let state = self.state_of(host)?;
            if state == wanted { Ok(()) } else { bail!("{host} is {state}") }
        })
    }

    /// Waits until a host that was away is ONLINE again, with a `set_online` when it waits for one.
    pub fn wait_back_online(&self, host: &str, limit: Duration) -> Result<()> {
        let mut asked: Option<(Instant, String)> = None;
        let silent = format!("agent on host {host} is not reachable");
        self.wait_for(&format!("{host} to be ONLINE again"), limit, || match self.state_of(host)?.as_str() {
            // Of a host that has just come back the state may be the one from before it went.
            "ONLINE" if self.control(&["show"])?.text.contains(&silent) => bail!("{silent}"),
            "ONLINE" => Ok(()),
            "AWAITING_RECOVERY" => {
                // Twice a second at most: every refusal is a line in the monitor's log.
                if asked.as_ref().is_none_or(|(at, _)| at.elapsed() > Duration::from_millis(500)) {
                    asked = Some((Instant::now(), self.control(&["set_online", host])?.text));
                }
                let answer = asked.as_ref().map_or("", |(_, text)| text.trim());
                bail!("{host} is AWAITING_RECOVERY; set_online: {answer}")
            }
            other => bail!("{host} is {other}"),
        })
    }

    fn serving(&self) -> Result<&'static str> {
        for ip in READERS {
            self.only_holder(ip.into())?;
        }
        let writer = self.writer()?;
        for host in DB.into_iter().filter(|h| *h != writer) {
            self.replicates(host)?;
        }
        Ok(writer)
    }

    // ---- what is true --------------------------------------------------------------------------------------------

    /// The database hosts whose kernel has the address.
    pub fn holders(&self, ip: IpAddr) -> Result<Vec<&'static str>> {
        let mut holders = Vec::new();
        for host in DB {
            if self.network.addresses(host)?.contains(&ip) {
                holders.push(host);
            }
        }
        Ok(holders)
    }

    /// The one holder of an address; none and two are errors.
    pub fn only_holder(&self, ip: IpAddr) -> Result<&'static str> {
        match self.holders(ip)?.as_slice() {
            [one] => Ok(one),
            [] => bail!("no host has {ip}"),
            several => bail!("several hosts have {ip}: {}", several.join(", ")),
        }
    }

    /// The host that has the writer address and is writable.
    pub fn writer(&self) -> Result<&'static str> {
        let host = self.only_holder(WRITER.into())?;
        if self.read_only(host)? {
            bail!("{host} has the writer address {WRITER} and is read-only");
        }
        Ok(host)
    }

    /// The reader addresses that a host has.
    pub fn readers_of(&self, host: &str) -> Result<Vec<IpAddr>> {
        let there = self.network.addresses(host)?;
        Ok(READERS.into_iter().map(IpAddr::from).filter(|ip| there.contains(ip)).collect())
    }

    pub fn read_only(&self, host: &str) -> Result<bool> {
        Ok(self.mysql(host, "SELECT @@global.read_only")?.value()? == "1")
    }

    /// One statement over the host's unix socket, whatever the network does; five seconds at most.
    pub fn mysql(&self, host: &str, sql: &str) -> Result<Table> {
        network::ip_of(host)?;
        server::query(&self.socket(host), sql, Duration::from_secs(5)).with_context(|| format!("on {host}"))
    }

    /// Several statements in one session over the host's unix socket; the answer of the last one.
    pub fn mysql_session(&self, host: &str, statements: &[&str]) -> Result<Table> {
        network::ip_of(host)?;
        server::session(&self.socket(host), statements, Duration::from_secs(10)).with_context(|| format!("on {host}"))
    }

    /// Both replication threads run; the error says what does not.
    pub fn replicates(&self, host: &str) -> Result<()> {
        let status = self.replication(host)?;
        let of = |column: &str| status.get(column).map_or("", String::as_str);
        if of("Slave_IO_Running") == "Yes" && of("Slave_SQL_Running") == "Yes" {
            return Ok(());
        }
        bail!(
            "{host}: I/O thread {}, SQL thread {}, {} {}",
            of("Slave_IO_Running"),
            of("Slave_SQL_Running"),
            of("Last_IO_Error"),
            of("Last_SQL_Error")
        )
    }

    /// SHOW SLAVE STATUS by column, in MariaDB's words for both dialects. Empty: it replicates from nobody.
    pub fn replication(&self, host: &str) -> Result<BTreeMap<String, String>> {
        self.state.server.replication(&self.socket(host)).with_context(|| format!("on {host}"))
    }

    pub fn socket(&self, host: &str) -> PathBuf {
        self.dir.join(host).join("mysqld.sock")
    }

    /// Looks at every host's addresses all the time, until [`Watch::finish`].
    pub fn watch(&self) -> Result<Watch> {
        Watch::start(&self.network)
    }

    // ---- clients -------------------------------------------------------------------------------------------------

    /// Starts a client on `app` that writes to the writer address.
    pub fn client(&self, config: ClientConfig) -> Result<Client> {
        Client::start(&self.network.netns(network::APP), config)
    }

    /// Starts many clients on `app` that write to the writer address.
    pub fn load(&self, config: LoadConfig) -> Result<Load> {
        Load::start(&self.network.netns(network::APP), config)
    }

    // ---- faults --------------------------------------------------------------------------------------------------

    /// Starts the server and waits until it answers.
    pub fn start_mysqld(&self, host: &str) -> Result<()> {
        let dir = self.dir.join(host);
        let running = {
            let _lock = server::lock_service(&dir)?;
            if let Some(running) = Running::load(&dir.join("mysqld.run")) {
                bail!("the server on {host} runs already (pid {})", running.pid);
            }
            server::forget_stopped(&dir)?;
            self.state.server.start(&self.network.netns(host), &dir)?
        };
        self.wait_ready(host, running)
    }

    /// What a service manager does for a server that has died: starts it, but not one that mmm_helperd has stopped or
    /// that runs already. Gives whether it has started it.
    pub fn revive_mysqld(&self, host: &str) -> Result<bool> {
        let dir = self.dir.join(host);
        let running = {
            let _lock = server::lock_service(&dir)?;
            if server::was_stopped(&dir) || Running::load(&dir.join("mysqld.run")).is_some() {
                return Ok(false);
            }
            self.state.server.start(&self.network.netns(host), &dir)?
        };
        self.wait_ready(host, running).map(|()| true)
    }

    /// Whether mmm_helperd has stopped the server, and nobody has started it since.
    pub fn is_stopped_by_helper(&self, host: &str) -> bool {
        server::was_stopped(&self.dir.join(host))
    }

    /// Ends the server cleanly and starts it with its data directory on a disk that has only `megabytes` left. Gives
    /// the data directory as the server sees it. The disk is gone when the server ends.
    pub fn restart_on_small_disk(&self, host: &str, megabytes: u32) -> Result<PathBuf> {
        let dir = self.dir.join(host);
        self.shut_down_mysqld(host)?;
        let running = self.state.server.start_on_small_disk(&self.network.netns(host), &dir, megabytes)?;
        self.wait_ready(host, running)?;
        let inside = dir.join("data");
        Ok(Path::new("/proc").join(running.pid.to_string()).join("root").join(inside.strip_prefix("/")?))
    }

    fn wait_ready(&self, host: &str, running: Running) -> Result<()> {
        let dir = self.dir.join(host);
        server::wait_ready(running, &self.socket(host), Duration::from_secs(60)).with_context(|| {
            format!("start the server on {host}; its log ends:\n{}", server::tail(&dir.join("mysqld.log"), 15))
        })
    }

    /// `kill -9`.
    pub fn kill_mysqld(&self, host: &str) -> Result<()> {
        self.kill(host, "mysqld")
    }

    /// SIGSTOP: it hangs, and its kernel still accepts connections.
    pub fn stop_mysqld(&self, host: &str) -> Result<()> {
        self.process(host, "mysqld")?.signal(Signal::SIGSTOP)
    }

    pub fn cont_mysqld(&self, host: &str) -> Result<()> {
        self.process(host, "mysqld")?.signal(Signal::SIGCONT)
    }

    /// SIGTERM, and waits for the end.
    pub fn shut_down_mysqld(&self, host: &str) -> Result<()> {
        self.end(host, "mysqld")
    }

    pub fn start_agent(&self, host: &str) -> Result<()> {
        let dir = self.dir.join(host);
        self.start_daemon(host, "mmm_agentd", &configs::agent_file(&self.dir, host), &dir)
    }

    /// What does for the agent what only root can. In the lab the agent is root too.
    pub fn start_helper(&self, host: &str) -> Result<()> {
        let dir = self.dir.join(host);
        self.start_daemon(host, "mmm_helperd", &configs::agent_file(&self.dir, host), &dir)
    }

    pub fn kill_agent(&self, host: &str) -> Result<()> {
        self.kill(host, "mmm_agentd")
    }

    /// SIGSTOP.
    pub fn stop_agent(&self, host: &str) -> Result<()> {
        self.process(host, "mmm_agentd")?.signal(Signal::SIGSTOP)
    }

    pub fn cont_agent(&self, host: &str) -> Result<()> {
        self.process(host, "mmm_agentd")?.signal(Signal::SIGCONT)
    }

    /// SIGTERM, and waits for the end.
    pub fn end_agent(&self, host: &str) -> Result<()> {
        self.end(host, "mmm_agentd")
    }

    pub fn start_monitor(&self) -> Result<()> {
        let dir = self.dir.join(MONITOR);
        self.start_daemon(MONITOR, "mmm_mond", &configs::monitor_file(&self.dir), &dir)
    }

    pub fn kill_monitor(&self) -> Result<()> {
        self.kill(MONITOR, "mmm_mond")
    }

    /// SIGSTOP.
    pub fn stop_monitor(&self) -> Result<()> {
        self.process(MONITOR, "mmm_mond")?.signal(Signal::SIGSTOP)
    }

    pub fn cont_monitor(&self) -> Result<()> {
        self.process(MONITOR, "mmm_mond")?.signal(Signal::SIGCONT)
    }

    /// SIGTERM, and waits for the end.
    pub fn end_monitor(&self) -> Result<()> {
        self.end(MONITOR, "mmm_mond")
    }

    /// Takes the host's network cable out.
    pub fn link_down(&self, host: &str) -> Result<()> {
        self.network.link_down(host)
    }

    pub fn link_up(&self, host: &str) -> Result<()> {
        self.network.link_up(host)
    }

    /// Drops what `from` sends to `to`; what comes back still arrives.
    pub fn cut(&self, from: &str, to: &str) -> Result<()> {
        self.network.cut(from, to)
    }

    /// Drops everything between the two.
    pub fn cut_both(&self, one: &str, other: &str) -> Result<()> {
        self.network.cut(one, other)?;
        self.network.cut(other, one)
    }

    pub fn heal(&self, from: &str, to: &str) -> Result<()> {
        self.network.heal(from, to)
    }

    /// Ends every cut.
    pub fn heal_all(&self) -> Result<()> {
        self.network.heal_all()
    }

    /// Gives the writer address to a host by hand and makes it writable: for labs without daemons.
    pub fn make_writer_by_hand(&self, host: &str) -> Result<()> {
        self.mysql(host, "SET GLOBAL read_only=0")?;
        self.network.add_address(host, WRITER)
    }

    // ---- waiting -------------------------------------------------------------------------------------------------

    /// [`wait_for`], with the answer to `show` in the error.
    pub fn wait_for<T>(&self, what: &str, limit: Duration, look: impl FnMut() -> Result<T>) -> Result<T> {
        wait_for(what, limit, look).map_err(|e| anyhow!("{e:#}\n{}", self.shown()))
    }

    /// The answer to `show`, for error messages.
    fn shown(&self) -> String {
        if !self.state.daemons {
            return String::new();
        }
        match self.control(&["show"]) {
            Ok(output) => format!("--- mmm_control show ({}):\n{}", output.code, output.text),
            Err(e) => format!("--- mmm_control show: {e:#}\n"),
        }
    }

    /// The last lines of every log.
    pub fn logs(&self, lines: usize) -> String {
        let mut all = String::new();
        for host in DB.into_iter().chain([MONITOR]) {
            for name in ["mmm_mond.log", "mmm_agentd.log", "mmm_helperd.log", "mysqld.log"] {
                let file = self.dir.join(host).join(name);
                let end = server::tail(&file, lines);
                if !end.is_empty() {
                    all.push_str(&format!("--- {}:\n{end}\n", file.display()));
                }
            }
        }
        all
    }

    /// What runs, for `mmm-lab status`: host, program, pid.
    pub fn running(&self) -> Vec<(&'static str, &'static str, Option<i32>)> {
        let daemons: &[&'static str] = if self.state.daemons { &["mmm_helperd", "mmm_agentd"] } else { &[] };
        let monitor = if self.state.daemons { Some((MONITOR, "mmm_mond")) } else { None };
        DB.into_iter()
            .flat_map(|host| ["mysqld"].iter().chain(daemons).map(move |program| (host, *program)))
            .chain(monitor)
            .map(|(host, program)| (host, program, Running::load(&self.run_file(host, program)).map(|r| r.pid)))
            .collect()
    }

    fn start_daemon(&self, host: &str, name: &str, config: &Path, dir: &Path) -> Result<()> {
        let run_file = dir.join(format!("{name}.run"));
        if let Some(running) = Running::load(&run_file) {
            bail!("{name} on {host} runs already (pid {})", running.pid);
        }
        process::start(Start {
            netns: &self.network.netns(host),
            program: &self.program(name)?,
            args: vec!["-c".to_owned(), config.display().to_string()],
            env: vec![
                ("RUST_LOG".to_owned(), self.state.log.clone()),
                ("RUST_BACKTRACE".to_owned(), "1".to_owned()),
                (
                    "PATH".to_owned(),
                    format!("{}:{}", self.state.server.tools(), std::env::var("PATH").unwrap_or_default()),
                ),
            ],
            log: dir.join(format!("{name}.log")),
            run_file,
        })?;
        Ok(())
    }

    fn program(&self, name: &str) -> Result<PathBuf> {
        let dir = self.state.bin_dir.as_ref().context("this lab was started without daemons")?;
        Ok(dir.join(name))
    }

    fn run_file(&self, host: &str, program: &str) -> PathBuf {
        self.dir.join(host).join(format!("{program}.run"))
    }

    fn process(&self, host: &str, program: &str) -> Result<Running> {
        network::ip_of(host)?;
        Running::load(&self.run_file(host, program)).with_context(|| format!("{program} does not run on {host}"))
    }

    fn kill(&self, host: &str, program: &str) -> Result<()> {
        let running = self.process(host, program)?;
        running.signal(Signal::SIGKILL)?;
        running.wait_gone(Duration::from_secs(10))
    }

    fn end(&self, host: &str, program: &str) -> Result<()> {
        let running = self.process(host, program)?;
        running.signal(Signal::SIGTERM)?;
        running.wait_gone(Duration::from_secs(30)).with_context(|| format!("end {program} on {host} by SIGTERM"))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Told to end: `take_down_own` is at it already.
        if self.owned && !process::starts_are_forbidden() {
            let keep = self.keep_logs || thread::panicking();
            if keep && self.print_logs {
                eprintln!("{}", self.logs(15));
            }
            if let Err(e) = tear_down(&self.dir, &self.network, keep) {
                eprintln!("lab {}: {e:#}", self.state.id);
            }
            if keep {
                eprintln!("lab {}: logs stay in {}", self.state.id, self.dir.display());
            }
        }
    }
}

/// A host's state in the answer to `show`.
fn state_in(shown: &str, host: &str) -> Option<String> {
    let line = shown.lines().find(|l| l.trim_start().starts_with(&format!("{host}(")))?;
    let (before, _) = line.split_once(". Roles:")?;
    before.rsplit_once('/').map(|(_, state)| state.to_owned())
}

/// Looks again and again until it is so, `limit` at most. The error tells what was waited for and what was seen last.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        let last = match look() {
            Ok(found) => return Ok(found),
            Err(last) => last,
        };
        if Instant::now() >= end {
            bail!("waited {limit:?} for {what}; seen last: {last:#}");
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Whether it stays so for the whole time; the error tells when it ended, and how.
pub fn stays(what: &str, how_long: Duration, mut look: impl FnMut() -> Result<()>) -> Result<()> {
    let began = Instant::now();
    while began.elapsed() < how_long {
        look().with_context(|| {
            format!("{what} should stay so for {how_long:?}, and ended after {:?}", began.elapsed())
        })?;
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// All labs of this machine with a state file, by id.
pub fn standing_ids() -> Vec<String> {
    standing().into_iter().map(|s| s.id).collect()
}

/// Takes down every lab that this process owns, because it is told to end; nothing is started any more.
pub fn take_down_own() {
    process::forbid_starts();
    let me = Running::myself();
    for state in standing().into_iter().filter(|s| s.owner.is_some() && s.owner == me) {
        let dir = folder(&state.id);
        if let Err(e) = tear_down(&dir, &Network::new(&state.id, &dir), false) {
            eprintln!("lab {}: {e:#}", state.id);
        }
    }
}

fn standing() -> Vec<State> {
    let Ok(entries) = fs::read_dir("/tmp") else { return Vec::new() };
    let mut found: Vec<State> = entries
        .flatten()
        .filter(|e| e.path().to_string_lossy().starts_with(FOLDERS))
        .filter_map(|e| serde_json::from_slice(&fs::read(e.path().join(STATE)).ok()?).ok())
        .collect();
    found.sort_by(|a, b| a.id.cmp(&b.id));
    found
}

/// Takes down labs whose owner was killed before it could.
fn sweep() {
    for state in standing() {
        if state.owner.is_some_and(|owner| !owner.is_alive()) {
            let dir = folder(&state.id);
            eprintln!("lab {}: its owner is gone; taking it down", state.id);
            if let Err(e) = tear_down(&dir, &Network::new(&state.id, &dir), false) {
                eprintln!("lab {}: {e:#}", state.id);
            }
        }
    }
}

fn folder(id: &str) -> PathBuf {
    PathBuf::from(format!("{FOLDERS}{id}"))
}

/// An id and its folder, which nobody else has.
fn claim(wanted: Option<String>) -> Result<(String, PathBuf)> {
    if let Some(id) = wanted {
        if id.is_empty() || id.len() > 12 || !id.chars().all(|c| c.is_ascii_alphanumeric()) {
            bail!("a lab's id has 1 to 12 letters and digits, not '{id}'");
        }
        let dir = folder(&id);
        fs::create_dir(&dir)
            .with_context(|| format!("make {}; if a lab {id} is up: `mmm-lab down --id {id}`", dir.display()))?;
        return Ok((id, dir));
    }
    let pid = std::process::id();
    for n in 0..1000_u32 {
        let id = format!("{:x}", pid.wrapping_mul(1000).wrapping_add(n) & 0xff_ffff);
        let dir = folder(&id);
        match fs::create_dir(&dir) {
            Ok(()) => return Ok((id, dir)),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).with_context(|| format!("make {}", dir.display())),
        }
    }
    bail!("no free lab id; folders of old labs are in {FOLDERS}*")
}

fn tear_down(dir: &Path, network: &Network, keep_logs: bool) -> Result<()> {
    let namespaces = network.all_netns();
    // A process may start another while it is being ended, so look again; every round kills all that is there.
    for _ in 0..50 {
        let inside: Vec<Running> = namespaces.iter().flat_map(|ns| process::inside(ns)).collect();
        if inside.is_empty() {
            break;
        }
        for running in &inside {
            let _ = running.signal(Signal::SIGKILL);
        }
        for running in inside {
            let _ = running.wait_gone(Duration::from_secs(5));
        }
    }
    network.down()?;
    if keep_logs {
        // The data, what a copy has left beside them, and what was temporary.
        for entry in DB.iter().filter_map(|host| fs::read_dir(dir.join(host)).ok()).flat_map(Iterator::flatten) {
            let name = entry.file_name();
            if name.to_string_lossy().starts_with("data") || name == "tmp" {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        // Without it the folder is no lab any more.
        let _ = fs::remove_file(dir.join(STATE));
        return Ok(());
    }
    match fs::remove_dir_all(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("remove {}", dir.display())),
    }
}

/// Where the daemons were built: MMM_BIN_DIR, or beside this program (tests lie one folder below it).
fn bin_dir() -> Result<PathBuf> {
    const PROGRAMS: [&str; 4] = ["mmm_mond", "mmm_agentd", "mmm_helperd", "mmm_control"];
    let complete = |dir: &Path| PROGRAMS.iter().all(|p| dir.join(p).exists());
    if let Some(dir) = std::env::var_os("MMM_BIN_DIR").map(PathBuf::from) {
        if !complete(&dir) {
            bail!("MMM_BIN_DIR={} does not have {}", dir.display(), PROGRAMS.join(", "));
        }
        return Ok(dir);
    }
    let me = std::env::current_exe()?;
    let found = me.ancestors().skip(1).take(2).find(|d| complete(d));
    found.map(Path::to_owned).with_context(|| {
        format!(
            "{} are not beside {}: run `cargo build --workspace` first, or set MMM_BIN_DIR",
            PROGRAMS.join(", "),
            me.display()
        )
    })
}

/// Does the same for every host at once.
fn on_each(hosts: [&str; 3], work: impl Fn(&str) -> Result<()> + Sync) -> Result<()> {
    let work = &work;
    thread::scope(|s| {
        let threads: Vec<_> = hosts.map(|host| s.spawn(move || work(host))).into_iter().collect();
        for thread in threads {
            match thread.join() {
                Ok(result) => result?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(())
    })
}
