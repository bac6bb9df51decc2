//! The lab's network: one namespace per host and one that holds the bridge, so that nothing of the machine's own
//! network is touched. Every host has one interface, `eth0`; the other end is a port of the bridge, named as the host.
//!
//! What the world does to a host is done at the bridge, where the host cannot see it: a port set down (the cable is
//! out), or frames dropped between two ports (a one-way cut, ARP included).

use super::process::{must, run, within};
use anyhow::{Context as _, Result, bail};
use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The bridge's own address: what a gateway would be. A cut may name it like a host.
pub const GATEWAY: &str = "gw";
pub const GATEWAY_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The host of `mmm_mond` and `mmm_control`.
pub const MONITOR: &str = "mon";
/// The host of the clients.
pub const APP: &str = "app";
/// The database hosts.
pub const DB: [&str; 3] = ["db1", "db2", "db3"];
pub const WRITER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 50);
pub const READERS: [Ipv4Addr; 3] =
    [Ipv4Addr::new(10, 77, 0, 51), Ipv4Addr::new(10, 77, 0, 52), Ipv4Addr::new(10, 77, 0, 53)];

const BRIDGE: &str = "net";
const LIMIT: Duration = Duration::from_secs(10);

/// A host's own address.
pub fn ip_of(host: &str) -> Result<Ipv4Addr> {
    Ok(match host {
        GATEWAY => GATEWAY_IP,
        MONITOR => Ipv4Addr::new(10, 77, 0, 2),
        APP => Ipv4Addr::new(10, 77, 0, 3),
        "db1" => Ipv4Addr::new(10, 77, 0, 11),
        "db2" => Ipv4Addr::new(10, 77, 0, 12),
        "db3" => Ipv4Addr::new(10, 77, 0, 13),
        other => bail!("the lab has no host '{other}'; its hosts are {}", hosts().join(", ")),
    })
}

/// Which of these hosts, all of which have the address, answer for it: an agent's exact guard holds the answers back once
/// the lease is over, while the kernel may keep the address for another second or two. None or one is as it should be.
pub fn answering<T: Copy>(hosts: &[(T, &Path)], ip: Ipv4Addr) -> Result<Vec<T>> {
    let passes = |netns: &Path| -> Result<bool> {
        let mut nft = Command::new("nft");
        nft.args(["list", "set", "inet", "mmm_guard", "alive4"]);
        let shown = run(Some(netns), nft, LIMIT).context("look at the exact guard")?;
        Ok(!shown.ok()
            || shown.text.split(|c: char| !(c.is_ascii_digit() || c == '.')).any(|word| word == ip.to_string()))
    };
    let mut first = Vec::new();
    for (host, netns) in hosts {
        if passes(netns)? {
            first.push((*host, *netns));
        }
    }
    // One after the other was asked: both answered at one moment only if who was asked first still does.
    let mut still = Vec::new();
    for (host, netns) in first {
        if passes(netns)? {
            still.push(host);
        }
    }
    Ok(still)
}

/// Every host with a namespace of its own, besides the bridge.
pub fn hosts() -> Vec<&'static str> {
    DB.iter().copied().chain([MONITOR, APP]).collect()
}

pub struct Network {
    id: String,
    /// One line per cut, "FROM TO"; beside the kernel's rules because several programs may cut and heal.
    cuts_file: PathBuf,
}

impl Network {
    pub fn new(id: &str, dir: &Path) -> Network {
        Network { id: id.to_owned(), cuts_file: dir.join("cuts") }
    }

    pub fn name(&self, host: &str) -> String {
        format!("mmm{}-{host}", self.id)
    }

    /// The namespace's file, to enter it.
    pub fn netns(&self, host: &str) -> PathBuf {
        Path::new("/run/netns").join(self.name(host))
    }

    pub fn all_netns(&self) -> Vec<PathBuf> {
        hosts().into_iter().chain([BRIDGE]).map(|h| self.netns(h)).filter(|p| p.exists()).collect()
    }

    pub fn up(&self) -> Result<()> {
        for host in hosts().into_iter().chain([BRIDGE]) {
            ip(&["netns", "add", &self.name(host)])?;
        }
        let mut bridge = format!(
            "link add br0 type bridge\nlink set br0 type bridge mcast_snooping 0\n\
             addr add {GATEWAY_IP}/24 dev br0\nlink set lo up\nlink set br0 up\n"
        );
        for host in hosts() {
            bridge.push_str(&format!(
                "link add {host} type veth peer name eth0 netns {}\nlink set {host} master br0\nlink set {host} up\n",
                self.name(host)
            ));
        }
        self.batch(BRIDGE, &bridge)?;
        for host in hosts() {
            let own = ip_of(host)?;
            self.batch(host, &format!("link set lo up\naddr add {own}/24 dev eth0\nlink set eth0 up\n"))?;
        }
        Ok(())
    }

    /// Removes every namespace; what is in them goes with them. Not being there is success.
    pub fn down(&self) -> Result<()> {
        let mut failed = Vec::new();
        for netns in self.all_netns() {
            let name = netns.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Err(e) = ip(&["netns", "del", &name]) {
                failed.push(format!("{e:#}"));
            }
        }
        if failed.is_empty() { Ok(()) } else { bail!("namespaces are left: {}", failed.join("; ")) }
    }

    /// Takes the host's cable out: it loses its carrier and every packet.
    pub fn link_down(&self, host: &str) -> Result<()> {
        ip_of(host)?;
        // Both directions at once: a port that is set down still brings what its host sends for a tenth of a second.
        ip(&["-n", &self.name(BRIDGE), "link", "set", host, "type", "bridge_slave", "state", "0"])?;
        self.port(host, "down")
    }

    pub fn link_up(&self, host: &str) -> Result<()> {
        self.port(host, "up")
    }

    fn port(&self, host: &str, state: &str) -> Result<()> {
        ip_of(host)?;
        ip(&["-n", &self.name(BRIDGE), "link", "set", host, state]).map(drop)
    }

    /// Drops everything that `from` sends to `to`, and nothing of what comes back. Both keep their carrier.
    pub fn cut(&self, from: &str, to: &str) -> Result<()> {
        ip_of(from)?;
        ip_of(to)?;
        if from == to {
            bail!("{from} cannot be cut from itself");
        }
        let mut cuts = self.cuts();
        cuts.insert((from.to_owned(), to.to_owned()));
        self.set_cuts(&cuts)
    }

    pub fn heal(&self, from: &str, to: &str) -> Result<()> {
        let mut cuts = self.cuts();
        cuts.remove(&(from.to_owned(), to.to_owned()));
        self.set_cuts(&cuts)
    }

    pub fn heal_all(&self) -> Result<()> {
        self.set_cuts(&BTreeSet::new())
    }

    pub fn cuts(&self) -> BTreeSet<(String, String)> {
        let text = fs::read_to_string(&self.cuts_file).unwrap_or_default();
        text.lines().filter_map(|l| l.split_once(' ')).map(|(a, b)| (a.to_owned(), b.to_owned())).collect()
    }

    /// These cuts and no others. The whole table is replaced in one transaction, so there is no moment with half of
    /// them.
    pub fn set_cuts(&self, cuts: &BTreeSet<(String, String)>) -> Result<()> {
        let (mut forward, mut input, mut output) = (String::new(), String::new(), String::new());
        for (from, to) in cuts {
            match (from.as_str(), to.as_str()) {
                (GATEWAY, to) => output.push_str(&format!("oifname \"{to}\" drop\n")),
                (from, GATEWAY) => input.push_str(&format!("iifname \"{from}\" drop\n")),
                (from, to) => forward.push_str(&format!("iifname \"{from}\" oifname \"{to}\" drop\n")),
            }
        }
        let rules = format!(
            "table bridge lab {{}}\ndelete table bridge lab\ntable bridge lab {{\n\
             chain forward {{ type filter hook forward priority 0; policy accept;\n{forward}}}\n\
             chain input {{ type filter hook input priority 0; policy accept;\n{input}}}\n\
             chain output {{ type filter hook output priority 0; policy accept;\n{output}}}\n}}\n"
        );
        let mut nft = Command::new("nft");
        nft.args(["-f", "-"]);
        feed(&self.netns(BRIDGE), nft, &rules).context("cut the lab's network with nftables")?;
        let lines: String = cuts.iter().map(|(a, b)| format!("{a} {b}\n")).collect();
        fs::write(&self.cuts_file, lines).with_context(|| format!("write {}", self.cuts_file.display()))
    }

    /// The addresses that the host's kernel has now.
    pub fn addresses(&self, host: &str) -> Result<BTreeSet<IpAddr>> {
        within(&self.netns(host), || -> Result<BTreeSet<IpAddr>> {
            let found = nix::ifaddrs::getifaddrs().context("list addresses")?;
            Ok(found
                .filter_map(|i| {
                    let address = i.address?;
                    let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
                    v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
                })
                .collect())
        })?
        .with_context(|| format!("look at {host}'s addresses"))
    }

    /// Adds a /32 by hand, for labs without agents.
    pub fn add_address(&self, host: &str, address: Ipv4Addr) -> Result<()> {
        self.batch(host, &format!("addr add {address}/32 dev eth0\n"))
    }

    pub fn remove_address(&self, host: &str, address: Ipv4Addr) -> Result<()> {
        self.batch(host, &format!("addr del {address}/32 dev eth0\n"))
    }

    fn batch(&self, host: &str, commands: &str) -> Result<()> {
        let mut ip = Command::new("ip");
        ip.args(["-batch", "-"]);
        feed(&self.netns(host), ip, commands).with_context(|| format!("configure the network of {host}"))
    }
}

fn ip(args: &[&str]) -> Result<String> {
    let mut command = Command::new("ip");
    command.args(args);
    must(None, command, LIMIT)
}

/// Runs a short-lived tool inside a namespace with text on its standard input.
fn feed(netns: &Path, mut command: Command, text: &str) -> Result<()> {
    let shown = format!("{command:?}");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = within(netns, || command.spawn())?.with_context(|| format!("start {shown}"))?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(text.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "{shown} ended with {}: {}\nIt was given:\n{text}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
