//! Two hosts and a cable: the guard is on `here`, and `there` asks by ARP, neighbour solicitation, ping and TCP.

use super::*;
use crate::arp;
use crate::netlink::Addresses;
use crate::testnet::{TwoHosts, inside, ip};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use nix::unistd::Pid;
use pnet_datalink::MacAddr;
use pnet_packet::arp::ArpOperations;
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

const ROLE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 50);

fn role() -> IpAddr {
    ROLE.into()
}

fn role6() -> IpAddr {
    "fd77::50".parse().unwrap()
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn known(managed: &[IpAddr]) -> Known {
    Known { managed: managed.iter().copied().collect(), ..Default::default() }
}

/// Of these addresses an agent has had something to do with all.
async fn begin(managed: &[IpAddr]) -> Result<Guard, String> {
    Guard::begin(&Alone::make_sure().unwrap(), known(managed)).await
}

fn allow(guard: &mut Guard, ip: IpAddr, rest: Duration) -> Result<(), String> {
    guard.allow_until(ip, clock::now() + rest)
}

/// The addresses are on `here`, and `there` knows where, so that pings and TCP do not depend on ARP.
fn with_roles() -> Option<TwoHosts> {
    let hosts = TwoHosts::new()?;
    let (here, there) = (&hosts.here, &hosts.there);
    let mac = mac_of(here);
    for role in [format!("{}/32", role()), format!("{}/128", role6())] {
        ip(&format!("-n {here} address add {role} dev eth0 nodad"));
    }
    for role in [role(), role6()] {
        ip(&format!("-n {there} neighbour replace {role} lladdr {mac} nud permanent dev eth0"));
    }
    Some(hosts)
}

fn mac_of(ns: &str) -> String {
    let shown = ip(&format!("-n {ns} link show eth0"));
    shown.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap().to_owned()
}

fn nft(ns: &str, words: &str) -> String {
    let arguments = ["netns", "exec", ns, "nft"];
    let output = Command::new("ip").args(arguments).args(words.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "nft {words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[derive(Clone, Copy, Debug)]
enum How {
    /// A who-has, by ARP or for IPv6 by a neighbour solicitation.
    WhoHas,
    Ping,
}

/// What came of asking again and again: when each question was asked, and whether it was answered.
struct Asked(Vec<(Millis, bool)>);

impl Asked {
    fn lost(&self) -> usize {
        self.0.iter().filter(|(_, answered)| !answered).count()
    }

    fn lost_before(&self, end: Millis) -> usize {
        self.0.iter().filter(|(at, answered)| *at < end && !answered).count()
    }

    fn last_answer(&self) -> Millis {
        self.0.iter().rev().find(|(_, answered)| *answered).expect("no answer at all").0
    }
}

/// From `there`, one question at a time.
fn ask(hosts: &TwoHosts, how: How, ip: IpAddr, end: Millis, wait: Duration) -> Asked {
    hosts.on_there(async || {
        let mut one: Box<dyn FnMut() -> bool> = match how {
            How::WhoHas => Box::new(who_has(ip, wait).await),
            How::Ping => Box::new(ping(ip, wait)),
        };
        let mut asked = Vec::new();
        while clock::now() < end {
            asked.push((clock::now(), one()));
            std::thread::sleep(ms(1));
        }
        Asked(asked)
    })
}

fn answers(hosts: &TwoHosts, how: How, ip: IpAddr) -> bool {
    ask(hosts, how, ip, clock::now() + ms(50), ms(50)).lost() == 0
}

async fn who_has(ip: IpAddr, wait: Duration) -> impl FnMut() -> bool {
    let link = Addresses::new("eth0").link().await.unwrap();
    let mac = MacAddr::from(link.mac.unwrap());
    let (question, protocol) = match ip {
        IpAddr::V4(ip) => (arp::arp_probe(mac, ip), 0x0806),
        IpAddr::V6(ip) => (arp::solicitation(mac, ip), 0x86dd),
    };
    let socket = nix::sys::socket::socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let (mut mouth, mut ear) = arp::on_interface("eth0", link, socket, protocol, ms(5)).unwrap();
    move || {
        mouth.send_to(&question, None).unwrap().unwrap();
        let end = clock::now() + wait;
        while clock::now() < end {
            let Ok(frame) = ear.next() else { continue };
            let answered = match ip {
                // A reply with the address as the sender's.
                IpAddr::V4(ip) => frame[20..22] == [0, 2] && frame[28..32] == ip.octets(),
                // A neighbour advertisement with the address as the target.
                IpAddr::V6(ip) => frame.len() >= 78 && frame[54] == 136 && frame[62..78] == ip.octets(),
            };
            if answered && frame[6..12] != mac.octets() {
                return true;
            }
        }
        false
    }
}

fn ping(ip: IpAddr, wait: Duration) -> impl FnMut() -> bool {
    let (domain, protocol) = match ip {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    let mut socket = Socket::new(domain, Type::RAW, Some(protocol)).unwrap();
    socket.connect(&std::net::SocketAddr::new(ip, 0).into()).unwrap();
    socket.set_read_timeout(Some(ms(5))).unwrap();
    let mut number = 0_u16;
    move || {
        number += 1;
        let mut echo = [0, 0, 0, 0, 0x6d, 0x6d, 0, 0];
        echo[0] = if ip.is_ipv4() { 8 } else { 128 };
        echo[6..8].copy_from_slice(&number.to_be_bytes());
        if ip.is_ipv4() {
            let sum: u32 = echo.chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum();
            let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
            echo[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        socket.send(&echo).unwrap();
        let end = clock::now() + wait;
        while clock::now() < end {
            let mut answer = [0; 128];
            let Ok(length) = socket.read(&mut answer) else { continue };
            let answer = &answer[if ip.is_ipv4() { 20 } else { 0 }..length];
            if answer[0] == (if ip.is_ipv4() { 0 } else { 129 }) && answer[6..8] == number.to_be_bytes() {
                return true;
            }
        }
        false
    }
}

/// What a process of its own is to do: the namespace, and how long to allow the addresses for.
const LIFE: &str = "MMM_AGENT_TEST_GUARD";
/// The test that is that process when [`LIFE`] is set.
const LIFE_TEST: &str = "guard::tests::the_answers_end_in_time_when_the_process_is_stopped_or_killed";

/// True in the process of [`Life::begin`].
fn is_another_life() -> bool {
    let Ok(task) = std::env::var(LIFE) else { return false };
    let (ns, rest_ms) = task.split_once(' ').unwrap();
    inside(ns, async || {
        // Not by println, which the test harness may keep to itself.
        let say = |what: String| writeln!(io::stdout(), "\n{what}").unwrap();
        // For as long as this process lives.
        let alone = Alone::make_sure();
        let begun = match &alone {
            Ok(alone) => Guard::begin(alone, known(&[role(), role6()])).await,
            Err(why) => Err(format!("{why:#}")),
        };
        match begun {
            Err(why) => say(format!("refused: {why}")),
            Ok(mut guard) => {
                let start = clock::now();
                for ip in [role(), role6()] {
                    guard.allow_until(ip, start + ms(rest_ms.parse().unwrap())).unwrap();
                }
                say(format!("armed: {}", start.0));
                std::thread::sleep(Duration::from_secs(30));
                guard.leave();
            }
        }
    });
    true
}

/// Another process with a guard, killed at the end.
struct Life {
    child: Child,
    /// Open to the end: the process complains when nobody reads what it says.
    _lines: Box<dyn Iterator<Item = String>>,
    /// "armed: …" or "refused: …"
    said: String,
}

impl Life {
    fn begin(ns: &str, rest_ms: u64, under: &[&str]) -> Life {
        let program = std::env::current_exe().unwrap();
        let mut command = under.to_vec();
        command.extend([program.to_str().unwrap(), "--exact", "--nocapture", LIFE_TEST]);
        let mut child = Command::new(command[0])
            .args(&command[1..])
            .env(LIFE, format!("{ns} {rest_ms}"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let said = lines.find(|l| l.starts_with("armed: ") || l.starts_with("refused: "));
        Life { child, _lines: Box::new(lines), said: said.expect("the other process ended without a word") }
    }

    fn armed_at(&self) -> Millis {
        let at = self.said.strip_prefix("armed: ").unwrap_or_else(|| panic!("{}", self.said));
        Millis(at.parse().unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[expect(clippy::print_stderr, reason = "a measurement is to be seen with --nocapture")]
fn figure(text: &str) {
    eprintln!("{text}");
}

#[test]
fn answers_go_on_without_a_loss_while_the_guard_is_rearmed() {
    let Some(hosts) = with_roles() else { return };
    hosts.on_here(async || {
        let mut guard = begin(&[role(), role6()]).await.unwrap();
        assert!(!answers(&hosts, How::WhoHas, role()) && !answers(&hosts, How::Ping, role()), "closed at first");
        for ip in [role(), role6()] {
            allow(&mut guard, ip, ms(1000)).unwrap();
        }
        let end = clock::now() + ms(1000);
        std::thread::scope(|scope| {
            let hosts = &hosts;
            let askers: Vec<_> = [role(), role6()]
                .into_iter()
                .flat_map(|ip| [How::WhoHas, How::Ping].map(|how| (how, ip)))
                .map(|(how, ip)| (how, ip, scope.spawn(move || ask(hosts, how, ip, end, ms(500)))))
                .collect();
            while clock::now() < end + ms(100) {
                for ip in [role(), role6()] {
                    allow(&mut guard, ip, ms(700)).unwrap();
                }
                std::thread::sleep(ms(100));
            }
            for (how, ip, asker) in askers {
                let asked = asker.join().unwrap();
                figure(&format!("{how:?} {ip}: {} questions, {} lost", asked.0.len(), asked.lost()));
                assert!(asked.0.len() > 10 && asked.lost() == 0, "{how:?} {ip}: {} lost", asked.lost());
            }
        });
        for ip in [role(), role6()] {
            guard.deny(ip).unwrap();
            assert!(!answers(&hosts, How::WhoHas, ip) && !answers(&hosts, How::Ping, ip), "{ip} after denying");
        }
        guard.leave();
    });
}

/// Asks in every way while the time runs out. The kernel may be early by its ticks, and this machine may be busy; late
/// is what it must not be.
fn ends_at(hosts: &TwoHosts, until: Millis, what: &str) {
    std::thread::scope(|scope| {
        let askers: Vec<_> = [role(), role6()]
            .into_iter()
            .flat_map(|ip| [How::WhoHas, How::Ping].map(|how| (how, ip)))
            .map(|(how, ip)| (how, ip, scope.spawn(move || ask(hosts, how, ip, until + ms(150), ms(30)))))
            .collect();
        for (how, ip, asker) in askers {
            let last = asker.join().unwrap().last_answer();
            let early = until.since(last).as_millis();
            figure(&format!("{what}, {how:?} {ip}: last answer {early} ms before the end of the lease"));
            assert!(last <= until + ms(20), "{what}, {how:?} {ip}: {:?} too late", last.since(until));
            assert!(early < 200, "{what}, {how:?} {ip}: {early} ms too early");
        }
    });
}

#[test]
fn the_answers_end_in_time_when_nothing_rearms_the_guard() {
    let Some(hosts) = with_roles() else { return };
    hosts.on_here(async || {
        let mut guard = begin(&[role(), role6()]).await.unwrap();
        let listener = TcpListener::bind((role(), 3306)).unwrap();
        let connect = || hosts.on_there(async || TcpStream::connect_timeout(&(role(), 3306).into(), ms(300)));
        allow(&mut guard, role(), Duration::from_secs(60)).unwrap();
        let mut client = connect().unwrap();
        let mut server = listener.accept().unwrap().0;
        // Shorter than before.
        let until = clock::now() + ms(700);
        for ip in [role(), role6()] {
            guard.allow_until(ip, until).unwrap();
        }
        ends_at(&hosts, until, "nothing re-arms");
        connect().expect_err("a new connection");
        server.write_all(b"an answer that is late").unwrap();
        client.set_read_timeout(Some(ms(300))).unwrap();
        client.read(&mut [0; 1]).expect_err("nor does what was connected get an answer");
        guard.allow_until(role(), until).expect_err("a lease that has ended is not armed");
        assert!(!answers(&hosts, How::Ping, role()));
        // The lease comes back, and the connection with it: the tables have held packets back and done no more.
        allow(&mut guard, role(), Duration::from_secs(60)).unwrap();
        connect().unwrap();
        guard.leave();
    });
}

#[test]
fn the_answers_end_in_time_when_the_process_is_stopped_or_killed() {
    if is_another_life() {
        return;
    }
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        let Some(hosts) = with_roles() else { return };
        let life = Life::begin(&hosts.here, 700, &[]);
        life.signal(signal);
        ends_at(&hosts, life.armed_at() + ms(700), signal.as_str());
    }
}

#[test]
fn the_next_process_takes_over_what_is_armed_without_a_gap_and_without_making_it_longer() {
    let Some(hosts) = with_roles() else { return };
    let life = Life::begin(&hosts.here, 3000, &[]);
    let until = life.armed_at() + ms(3000);
    std::thread::scope(|scope| {
        let hosts = &hosts;
        let askers =
            [How::WhoHas, How::Ping].map(|how| scope.spawn(move || ask(hosts, how, role(), until + ms(100), ms(300))));
        let second = hosts.on_here(async || Alone::make_sure().map(|_| ()));
        let second = second.expect_err("while the first one lives").to_string();
        assert!(second.contains(&format!("another mmm_agentd (pid {})", life.child.id())), "{second}");
        drop(life);
        // With another set of addresses: one has left the configuration, one has come.
        let other = IpAddr::from([10, 77, 0, 51]);
        hosts.on_here(async || {
            let guard = begin(&[role(), other]).await.unwrap();
            let left = guard.left().clone();
            assert_eq!(left.keys().copied().collect::<Vec<_>>(), [role()], "the other was never armed");
            assert!(left[&role()] <= until && left[&role()] + ms(50) > until, "{left:?}, armed until {until:?}");
            assert!(clock::now() < until, "too slow to try anything: {:?} late", clock::now().since(until));
            let shown = nft(&hosts.here, "list table inet mmm_guard");
            assert!(shown.contains("10.77.0.51") && !shown.contains("127.109.109.109"), "{shown}");
            guard.leave();
        });
        for asker in askers {
            let asked = asker.join().unwrap();
            // Its last element ends on a tick of the kernel.
            let (lost, last) = (asked.lost_before(until - ms(20)), asked.last_answer());
            figure(&format!("taken over: {} questions, {lost} lost before the end", asked.0.len()));
            assert_eq!(lost, 0);
            assert!(last <= until + ms(20), "{:?} too late", last.since(until));
        }
    });
}

#[test]
fn of_what_has_ended_nothing_is_left_for_the_next_process() {
    let Some(hosts) = with_roles() else { return };
    hosts.on_here(async || {
        let mut guard = begin(&[role(), role6()]).await.unwrap();
        let until = clock::now() + Duration::from_secs(60);
        guard.allow_until(role6(), until).unwrap();
        allow(&mut guard, role(), ms(20)).unwrap();
        guard.leave();
        while answers(&hosts, How::Ping, role()) {}
        let guard = begin(&[role(), role6()]).await.unwrap();
        let left = guard.left();
        assert_eq!(left.keys().copied().collect::<Vec<_>>(), [role6()]);
        assert!(left[&role6()] <= until && left[&role6()] + ms(50) > until, "{left:?}, armed until {until:?}");
        guard.leave();
        // It is no more in the configuration, nor remembered.
        let guard = begin(&[role()]).await.unwrap();
        assert_eq!(*guard.left(), BTreeMap::new());
        guard.leave();
    });
}

#[test]
fn what_an_agent_without_the_guard_has_left_answers_for_its_rest_and_what_it_never_had_is_left_alone() {
    let Some(hosts) = with_roles() else { return };
    let by_hand = IpAddr::from([10, 77, 0, 51]);
    ip(&format!("-n {} address add {by_hand}/32 dev eth0", hosts.here));
    ip(&format!(
        "-n {} neighbour replace {by_hand} lladdr {} nud permanent dev eth0",
        hosts.there,
        mac_of(&hosts.here)
    ));
    let until = clock::now() + ms(2000);
    std::thread::scope(|scope| {
        let hosts = &hosts;
        let asker = scope.spawn(move || ask(hosts, How::Ping, role(), until + ms(200), ms(100)));
        let unasked = scope.spawn(move || ask(hosts, How::Ping, by_hand, until + ms(200), ms(300)));
        let mut guard = hosts.on_here(async || {
            let roles = BTreeSet::from([role(), role6(), by_hand]);
            let known = Known { roles, unguarded: BTreeMap::from([(role(), until)]), ..known(&[role(), role6()]) };
            Guard::begin(&Alone::make_sure().unwrap(), known).await.unwrap()
        });
        assert_eq!(*guard.left(), BTreeMap::from([(role(), until)]));
        assert!(!answers(hosts, How::Ping, role6()), "closed: no order for it holds");
        let asked = asker.join().unwrap();
        assert!(asked.lost_before(until - ms(120)) == 0 && asked.last_answer() <= until + ms(20));
        assert_eq!(unasked.join().unwrap().lost(), 0, "put there by hand, and no order has spoken of it");

        allow(&mut guard, by_hand, ms(300)).unwrap();
        assert!(answers(hosts, How::Ping, by_hand));
        std::thread::sleep(ms(300));
        assert!(!answers(hosts, How::Ping, by_hand), "it is guarded since it was allowed");
        guard.leave();
    });
}

#[test]
fn other_tables_are_untouched_and_nothing_is_left() {
    let Some(hosts) = with_roles() else { return };
    let here = &hosts.here;
    let foreign = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        foreign.path(),
        "table inet filter {
             set alive4 { type ipv4_addr; flags timeout; elements = { 192.0.2.1 } }
             chain input {
                 type filter hook input priority 0; policy accept;
                 tcp dport 22 counter accept
             }
         }
         table arp filter {
             chain input {
                 type filter hook input priority 0; policy accept;
                 arp operation reply accept
             }
         }
         table ip nat {
             chain post {
                 type nat hook postrouting priority 100;
                 ip daddr 192.0.2.9 masquerade
             }
         }",
    )
    .unwrap();
    nft(here, &format!("-f {}", foreign.path().display()));
    let before = nft(here, "-a list ruleset");
    assert!(before.contains("192.0.2.9"));
    let tables = ["inet filter", "arp filter", "ip nat"];
    let list = || tables.map(|table| nft(here, &format!("-a list table {table}")));
    let foreign_before = list();
    hosts.on_here(async || {
        let mut guard = begin(&[role(), role6()]).await.unwrap();
        allow(&mut guard, role(), Duration::from_secs(60)).unwrap();
        assert_eq!(list(), foreign_before);
        assert_ne!(nft(here, "-a list ruleset"), before);
        guard.deny(role()).unwrap();

        let why = guard.end().unwrap_err();
        assert!(why.contains("10.77.0.50, fd77::50 is still on this host"), "{why}");
        assert!(!answers(&hosts, How::Ping, role()), "an address that is still here stays closed");
        let guard = begin(&[role(), role6()]).await.unwrap();
        drop(guard);
        assert!(!answers(&hosts, How::Ping, role()), "dropping is no different");

        for role in [format!("{}/32", role()), format!("{}/128", role6())] {
            ip(&format!("-n {here} address del {role} dev eth0"));
        }
        let guard = begin(&[role(), role6()]).await.unwrap();
        guard.end().unwrap();
        assert_eq!(nft(here, "-a list ruleset"), before);
        let guard = begin(&[role(), role6()]).await.unwrap();
        drop(guard);
        assert_eq!(nft(here, "-a list ruleset"), before);
        assert!(
            !ip(&format!("-n {here} -6 address show dev lo")).contains("100::"),
            "the address of the proof is gone"
        );
    });
}

#[test]
fn a_firewall_that_flushes_everything_opens_nothing_for_good() {
    let Some(hosts) = with_roles() else { return };
    hosts.on_here(async || {
        let mut guard = begin(&[role(), role6()]).await.unwrap();
        allow(&mut guard, role6(), Duration::from_secs(60)).unwrap();
        nft(&hosts.here, "flush ruleset");
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let version: Vec<u32> = release.split(['.', '-']).take(2).map(|n| n.parse().unwrap()).collect();
        let lost = version < vec![6, 9];
        assert_eq!(answers(&hosts, How::Ping, role()), lost, "kernels before 6.9 have lost the tables now");
        allow(&mut guard, role(), Duration::from_secs(60)).unwrap();
        assert!(answers(&hosts, How::Ping, role()) && answers(&hosts, How::Ping, role6()));
        guard.deny(role()).unwrap();
        assert!(!answers(&hosts, How::Ping, role()) && answers(&hosts, How::Ping, role6()));

        // By the guard's own socket, as it looks on such a kernel.
        table::remove(&guard.kernel).unwrap();
        assert!(answers(&hosts, How::Ping, role()), "without tables nothing is held back");
        guard.deny(role()).unwrap();
        assert!(!answers(&hosts, How::Ping, role()), "made again");
        assert!(answers(&hosts, How::Ping, role6()), "with what was armed");
        guard.leave();
    });
}

/// Waits for word of a change.
async fn told(watch: &mut Watch) {
    let told = tokio::time::timeout(Duration::from_secs(5), watch.recv()).await;
    assert_eq!(told, Ok(Some(())), "nobody told of the change");
}

#[test]
fn on_an_older_kernel_what_others_do_to_the_tables_is_heard_of_and_made_good() {
    let Some(hosts) = with_roles() else { return };
    let foreign = tempfile::NamedTempFile::new().unwrap();
    let here = &hosts.here;
    hosts.on_here(async || {
        let alone = Alone::make_sure().unwrap();
        let mut guard = Guard::begin_unowned(&alone, known(&[role(), role6()])).await.unwrap();
        let mut watch = guard.watch().unwrap();
        allow(&mut guard, role6(), Duration::from_secs(60)).unwrap();
        // Those of begin_unowned were told by nobody else.
        assert!(tokio::time::timeout(ms(100), watch.recv()).await.is_err(), "its own changes are no news");
        for change in [
            "flush ruleset",
            "delete table inet mmm_guard",
            "delete table arp mmm_guard",
            "flush chain inet mmm_guard input",
            "insert rule inet mmm_guard input accept",
            "flush set inet mmm_guard guarded4",
            "add table inet mmm_guard { flags dormant; }",
            // Cannot be taken over: sets of another kind.
            "flush ruleset; table inet mmm_guard { set alive4 { type ether_addr; }; }",
        ] {
            std::fs::write(foreign.path(), change.replace("; ", "\n")).unwrap();
            nft(here, &format!("-f {}", foreign.path().display()));
            let start = std::time::Instant::now();
            told(&mut watch).await;
            let heard = start.elapsed();
            guard.check().unwrap();
            figure(&format!("{change}: heard of after {heard:?}, made good after {:?}", start.elapsed()));
            assert!(!answers(&hosts, How::Ping, role()) && answers(&hosts, How::Ping, role6()), "after: {change}");
        }
        assert!(!answers(&hosts, How::WhoHas, role()));

        // Nothing is told of what others do to their own.
        nft(here, "add table inet other");
        assert!(tokio::time::timeout(ms(100), watch.recv()).await.is_err());

        let other = take_the_tables();
        let why = guard.check().unwrap_err();
        assert!(why.contains("another process owns the tables"), "{why}");
        assert!(Alone::make_sure().is_err(), "the lock is held");
        drop(alone);
        assert!(Alone::make_sure().err().unwrap().to_string().contains("owns the nftables tables"));
        drop(other);
        Alone::make_sure().unwrap();
        guard.check().unwrap();
        guard.leave();
    });
}

#[test]
fn tables_that_an_older_kernel_would_have_made_are_taken_over_and_made_again() {
    let Some(hosts) = with_roles() else { return };
    hosts.on_here(async || {
        let roles = BTreeSet::from([role(), role6()]);
        let until = clock::now() + Duration::from_secs(60);
        let kernel = Kernel::open().unwrap();
        table::put_up(&kernel, &roles, &BTreeMap::new(), 0).unwrap();
        table::set_alive(&kernel, role(), NonZeroU64::new(60_000), false).unwrap();
        let mut guard = begin(&[role(), role6()]).await.unwrap();
        assert!(answers(&hosts, How::Ping, role()) && !answers(&hosts, How::Ping, role6()));
        guard.allow_until(role(), until).unwrap();
        nft(&hosts.here, "flush ruleset");
        assert!(answers(&hosts, How::Ping, role6()), "nobody owned them, so they are gone");
        guard.deny(role6()).unwrap();
        assert!(answers(&hosts, How::Ping, role()) && !answers(&hosts, How::Ping, role6()), "as before");
        guard.leave();
    });
}

#[test]
fn what_was_proved_is_not_proved_again_as_long_as_the_tables_are_there() {
    let Some(hosts) = with_roles() else { return };
    hosts.on_here(async || {
        let took = async || {
            let start = std::time::Instant::now();
            begin(&[role(), role6()]).await.map(|guard| (guard.leave(), start.elapsed()).1)
        };
        let first = took().await.unwrap();
        figure(&format!("begin, with the proof: {first:?}; again: {:?}", took().await.unwrap()));
        // Without lo nothing can be proved.
        ip(&format!("-n {} link set lo down", hosts.here));
        took().await.unwrap();
        assert!(!answers(&hosts, How::Ping, role()), "and it holds all the same");
        table::remove(&Kernel::open().unwrap()).unwrap();
        assert!(took().await.unwrap_err().contains("lo"));
    });
}

#[test]
fn tables_are_not_cleared_away_while_one_of_their_addresses_is_here() {
    let Some(hosts) = with_roles() else { return };
    hosts.on_here(async || {
        begin(&[role(), role6()]).await.unwrap().leave();
        let alone = Alone::make_sure().unwrap();
        assert_eq!(left().unwrap(), Some(BTreeSet::from([role(), role6()])));
        assert!(clear_away(&alone).unwrap_err().contains("10.77.0.50, fd77::50 is still on this host"));
        assert!(!answers(&hosts, How::Ping, role()));
        for role in [format!("{}/32", role()), format!("{}/128", role6())] {
            ip(&format!("-n {} address del {role} dev eth0", hosts.here));
        }
        clear_away(&alone).unwrap();
        assert_eq!(nft(&hosts.here, "list ruleset"), "");
        assert_eq!(left().unwrap(), None);
        clear_away(&alone).unwrap();
    });
}

#[test]
fn tables_are_not_there_where_the_kernel_cannot_have_any() {
    let answer = |errno: Errno| table::unless_missing::<()>(Err(io::Error::from(errno)));
    for errno in [Errno::ENOENT, Errno::EINVAL, Errno::EOPNOTSUPP, Errno::EPROTONOSUPPORT, Errno::EAFNOSUPPORT] {
        assert!(matches!(answer(errno), Ok(None)), "{errno}");
    }
    assert!(answer(Errno::EPERM).is_err() && answer(Errno::ENOMEM).is_err());
}

/// With DNAT and REDIRECT the packets for an address have another destination before they come to `input`.
#[test]
fn changed_destinations_do_not_go_round_the_guard() {
    let Some(hosts) = with_roles() else { return };
    let foreign = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        foreign.path(),
        "table inet nat {
             chain pre {
                 type nat hook prerouting priority dstnat;
                 tcp dport 3305 redirect to :3306
                 ip daddr 10.77.0.50 tcp dport 3307 dnat ip to 10.77.0.1:3306
                 ip6 daddr fd77::50 tcp dport 3307 dnat ip6 to [fd77::1]:3306
                 fib daddr type local tcp dport 3308 dnat ip to 10.78.0.3:3306
             }
             chain post {
                 type nat hook postrouting priority srcnat;
                 oifname eth1 masquerade
             }
         }",
    )
    .unwrap();
    // A container of the host, in which the server could be as well.
    let inner = Third::behind(&hosts);
    nft(&hosts.here, &format!("-f {}", foreign.path().display()));
    hosts.on_here(async || {
        let mut guard = begin(&[role(), role6()]).await.unwrap();
        let listener = TcpListener::bind("[::]:3306").unwrap();
        let behind = inside(&inner.name, async || TcpListener::bind("10.78.0.3:3306").unwrap());
        let connect =
            |ip: IpAddr, port: u16| hosts.on_there(async || TcpStream::connect_timeout(&(ip, port).into(), ms(200)));
        let ways = [
            (role(), 3305, &listener),
            (role6(), 3305, &listener),
            (role(), 3307, &listener),
            (role6(), 3307, &listener),
            (role(), 3308, &behind),
        ];
        for (ip, port, _) in ways {
            connect(ip, port).expect_err("closed at first");
        }
        for ip in [role(), role6()] {
            allow(&mut guard, ip, Duration::from_secs(60)).unwrap();
        }
        let connected = ways.map(|(ip, port, listener)| {
            let client = connect(ip, port).unwrap_or_else(|e| panic!("{ip} port {port}: {e}"));
            client.set_read_timeout(Some(ms(200))).unwrap();
            (client, listener.accept().unwrap().0)
        });
        let until = clock::now() + ms(300);
        for ip in [role(), role6()] {
            guard.allow_until(ip, until).unwrap();
        }
        while clock::now() < until + ms(20) {
            std::thread::sleep(ms(5));
        }
        for ((ip, port, _), (mut client, mut server)) in ways.into_iter().zip(connected) {
            connect(ip, port).expect_err("a new connection");
            client.write_all(b"a question that is late").unwrap();
            server.set_read_timeout(Some(ms(200))).unwrap();
            assert!(server.read(&mut [0; 1]).is_err(), "{ip} port {port}: what was connected is heard");
            server.write_all(b"an answer that is late").unwrap();
            let heard = client.read(&mut [0; 1]);
            assert!(heard.is_err(), "{ip} port {port}: what was connected gets an answer");
        }
        guard.leave();
    });
}

/// The host is a router between others, of whom one has the address now.
#[test]
fn what_the_host_passes_on_to_the_holder_of_the_address_passes() {
    let Some(hosts) = TwoHosts::new() else { return };
    let inner = Third::behind(&hosts);
    ip(&format!("-n {} address add {}/32 dev lo", inner.name, role()));
    ip(&format!("-n {} route add {} via 10.78.0.3", hosts.here, role()));
    ip(&format!("-n {} route add {} via 10.77.0.1", hosts.there, role()));
    hosts.on_here(async || {
        let guard = begin(&[role()]).await.unwrap();
        assert!(answers(&hosts, How::Ping, role()), "through this host");
        let _server = inside(&inner.name, async || TcpListener::bind((role(), 3306)).unwrap());
        TcpStream::connect_timeout(&(role(), 3306).into(), Duration::from_secs(2)).expect("from this host");
        guard.end().unwrap();
    });
}

/// A third namespace, behind `here`, that reaches `there` through it.
struct Third {
    name: String,
}

impl Third {
    fn behind(hosts: &TwoHosts) -> Third {
        let third = Third { name: format!("{}c", hosts.here) };
        let (here, name) = (&hosts.here, &third.name);
        ip(&format!("netns add {name}"));
        ip(&format!("-n {here} link add eth1 type veth peer name eth0 netns {name}"));
        for words in [
            format!("-n {here} address add 10.78.0.1/24 dev eth1"),
            format!("-n {here} link set eth1 up"),
            format!("-n {name} address add 10.78.0.3/24 dev eth0"),
            format!("-n {name} link set eth0 up"),
            format!("-n {name} link set lo up"),
            format!("-n {name} route add default via 10.78.0.1"),
            format!("netns exec {here} sysctl -q -w net.ipv4.ip_forward=1"),
        ] {
            ip(&words);
        }
        third
    }
}

impl Drop for Third {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

#[test]
fn a_process_that_was_stopped_while_arming_does_not_make_the_lease_longer() {
    let Some(hosts) = with_roles() else { return };
    hosts.on_here(async || {
        let mut guard = begin(&[role()]).await.unwrap();
        // What the clock shows before and after each try.
        let mut arm = |shown: &[u64]| {
            let start = clock::now();
            let (until, mut shown) = (start + ms(60_000), shown.iter());
            let armed = guard.arm(role(), until, || start + ms(*shown.next().expect("more tries than expected")));
            (armed, nft(&hosts.here, "list set inet mmm_guard alive4"))
        };
        let (armed, shown) = arm(&[0, 10_000, 10_000, 10_001]);
        armed.unwrap();
        // 60 s, less the 10 s that have passed, less 10 s in case it happens again, less the clock's last digit.
        // It ends on a tick of the kernel.
        assert!(shown.contains("timeout 39s99"), "{shown}");
        let (armed, shown) = arm(&[0, 61_000, 61_000]);
        assert!(armed.unwrap_err().contains("the lease of 10.77.0.50 ended"));
        assert!(!shown.contains("10.77.0.50"), "{shown}");
        guard.leave();
    });
}

#[test]
fn this_host_hears_where_the_address_has_gone() {
    let Some(hosts) = TwoHosts::new() else { return };
    let (here, there) = (&hosts.here, &hosts.there);
    hosts.on_here(async || {
        let guard = begin(&[role(), role6()]).await.unwrap();
        for role in [role(), role6()] {
            ip(&format!("-n {here} neighbour replace {role} lladdr 02:00:00:00:00:99 nud stale dev eth0"));
        }
        let mac = mac_of(there);
        let knows = |role: IpAddr| ip(&format!("-n {here} neighbour show {role} dev eth0")).contains(&mac);
        assert!(!knows(role()) && !knows(role6()));
        let heard = (0..50).any(|_| {
            hosts.on_there(async || {
                let link = Addresses::new("eth0").link().await.unwrap();
                let mac = MacAddr::from(link.mac.unwrap());
                let socket =
                    nix::sys::socket::socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None);
                let (mut mouth, _) = arp::on_interface("eth0", link, socket.unwrap(), 0, ms(5)).unwrap();
                let IpAddr::V6(role6) = role6() else { unreachable!() };
                for frame in [arp::announcement(mac, ROLE, ArpOperations::Request), arp::advertisement(mac, role6)] {
                    mouth.send_to(&frame, None).unwrap().unwrap();
                }
            });
            std::thread::sleep(ms(50));
            knows(role()) && knows(role6())
        });
        assert!(heard, "{}", ip(&format!("-n {here} neighbour show")));
        guard.end().unwrap();
    });
}

#[test]
fn without_the_permission_the_error_says_what_is_missing() {
    let Some(hosts) = with_roles() else { return };
    let life = Life::begin(&hosts.here, 700, &["setpriv", "--bounding-set=-net_admin"]);
    assert!(life.said.starts_with("refused: ") && life.said.contains("CAP_NET_ADMIN is missing"), "{}", life.said);
    assert!(answers(&hosts, How::Ping, role()), "nothing is held back");
}

#[test]
fn a_guard_that_cannot_be_proved_is_not_begun_and_leaves_nothing() {
    let Some(hosts) = TwoHosts::new() else { return };
    ip(&format!("-n {} link set lo down", hosts.here));
    let begun = hosts.on_here(async || begin(&[role()]).await.map(|_| ()));
    assert!(begun.unwrap_err().contains("lo"));
    assert_eq!(nft(&hosts.here, "list ruleset"), "");
}

#[test]
fn arming_takes_far_less_than_a_millisecond() {
    let Some(hosts) = with_roles() else { return };
    hosts.on_here(async || {
        let many: BTreeSet<IpAddr> = (0..100).map(|n| IpAddr::from([10, 77, 1, n])).chain([role(), role6()]).collect();
        let start = std::time::Instant::now();
        let many: Vec<IpAddr> = many.into_iter().collect();
        let mut guard = begin(&many).await.unwrap();
        figure(&format!("begin, with {} addresses of both families: {:?}", many.len(), start.elapsed()));
        for (ip, name) in [(role(), "IPv4 (two tables)"), (role6(), "IPv6")] {
            let mut took: Vec<Duration> = (0..1000)
                .map(|_| {
                    let start = std::time::Instant::now();
                    allow(&mut guard, ip, Duration::from_secs(3)).unwrap();
                    start.elapsed()
                })
                .collect();
            took.sort();
            figure(&format!("allow, {name}: median {:?}, p99 {:?}, longest {:?}", took[500], took[990], took[999]));
            assert!(took[500] < ms(1), "{:?}", took[500]);
        }
        guard.leave();
    });
}
