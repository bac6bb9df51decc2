//! What `mmm_control doctor` wants to know of this host: the local server, logins at the others, the interface, what
//! leaves it and what arrives, the other agents' ports, the kernel.
//!
//! It only looks: no setting, no address and no role is touched, and the core never hears of it. Everything is looked at
//! at once and has a deadline; whatever blocks does so on a thread of its own. One examination at a time, so that who
//! asks again and again keeps nobody busy.

mod kernel;
mod wire;

use crate::lines::{self, Ended, NotNow};
use crate::mysql;
use crate::netlink::Addresses;
use futures_util::future::{BoxFuture, join_all};
use mmm_common::config::{Agent as Config, Host};
use mmm_common::examine::{Examined, Facts, Finding, Severity, Subject, cluster_words};
use mmm_common::ids::HostName;
use mmm_common::wire::{FromAgent, to_line};
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::TcpSocket;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::time::timeout;

/// For each part of an examination, beside the deadlines inside of it.
const PART: Duration = Duration::from_secs(6);
/// For another agent's port to answer.
const CONNECT: Duration = Duration::from_secs(1);

/// Examines this host when it is asked to.
#[derive(Clone)]
pub(crate) struct Examiner {
    look: Arc<dyn Fn() -> BoxFuture<'static, Examined> + Send + Sync>,
    busy: Arc<AtomicBool>,
}

impl std::fmt::Debug for Examiner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Examiner").field("busy", &self.busy).finish_non_exhaustive()
    }
}

/// For the host of this configuration. `unguarded`: why there is no exact guard.
pub(crate) fn of(config: &Arc<Config>, unguarded: Option<String>) -> Examiner {
    let config = Arc::clone(config);
    Examiner::new(move || look(Arc::clone(&config), unguarded.clone()))
}

impl Examiner {
    pub(crate) fn new<F>(look: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Examined> + Send + 'static,
    {
        Examiner { look: Arc::new(move || Box::pin(look())), busy: Arc::default() }
    }

    /// Finds nothing, at once.
    #[cfg(test)]
    pub(crate) fn nothing() -> Self {
        Examiner::new(async || Examined { findings: vec![], facts: Facts::default() })
    }

    /// Answers one request. `obeys_another`: why the monitor that asks is not the one that this host obeys.
    pub(crate) async fn serve(&self, writing: &mut OwnedWriteHalf, obeys_another: Option<String>) -> Ended {
        let Some(_turn) = Turn::take(&self.busy) else {
            let why = "this host is being examined already; try again in some seconds".to_owned();
            return Ended::NotNow(NotNow { logged: why.clone(), told: why });
        };
        match self.answer(writing, obeys_another).await {
            Ok(()) => Ended::Closed,
            Err(ended) => ended,
        }
    }

    async fn answer(&self, writing: &mut OwnedWriteHalf, obeys_another: Option<String>) -> Result<(), Ended> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_ms = u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX);
        lines::write(writing, &to_line(&FromAgent::Examining { unix_ms })?).await?;
        let mut examined = (self.look)().await;
        if let Some(why) = obeys_another {
            examined.findings.push(Finding::bad(
                Severity::Error,
                Subject::Agent,
                "whether the agent obeys this monitor",
                why,
                "stop the other mmm_mond, or ask that one",
            ));
        }
        lines::write(writing, &to_line(&FromAgent::Examined(Box::new(examined)))?).await
    }
}

/// The right to examine; given back when dropped.
struct Turn(Arc<AtomicBool>);

impl Turn {
    fn take(busy: &Arc<AtomicBool>) -> Option<Turn> {
        (!busy.swap(true, Ordering::SeqCst)).then(|| Turn(Arc::clone(busy)))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

async fn look(config: Arc<Config>, unguarded: Option<String>) -> Examined {
    let mut facts = Facts {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        cluster: cluster_words(&config.cluster),
        server: None,
        heard: None,
    };
    let Some(host) = config.cluster.hosts.get(&config.this) else {
        return Examined { findings: Vec::new(), facts };
    };
    let (server, logins, wire, ports, kernel) = tokio::join!(
        timeout(PART, mysql::examine::server(&config)),
        timeout(PART, mysql::examine::replication_logins(&config)),
        timeout(PART, wire::look(&config, host)),
        timeout(PART, ports(&config, host)),
        timeout(PART, kernel::look(&config, unguarded)),
    );
    let mut findings = Vec::new();
    match server {
        Ok((found, server)) => {
            findings.extend(found);
            facts.server = server;
        }
        Err(_) => findings.push(late(Subject::Server, "the local server's settings")),
    }
    match wire {
        Ok((found, heard)) => {
            findings.extend(found);
            facts.heard = heard;
        }
        Err(_) => findings.push(late(Subject::Arp, "announcements on the cluster's interface")),
    }
    findings.extend(logins.unwrap_or_else(|_| vec![late(Subject::ReplicationUser, "logins at the other hosts")]));
    findings.extend(ports.unwrap_or_else(|_| vec![late(Subject::AgentPort, "the other agents' ports")]));
    findings.extend(kernel.unwrap_or_else(|_| vec![late(Subject::Kernel, "the kernel's features")]));
    Examined { findings: findings.into_iter().map(|f| f.on(&config.this)).collect(), facts }
}

fn late(subject: Subject, tried: &str) -> Finding {
    let found = format!("no end after {} s", PART.as_secs());
    Finding::bad(Severity::Error, subject, tried, found, "ask again; look at the load of this host")
}

/// Only whether they answer: a hello would take the place of the connection by which this agent asks for vouches.
async fn ports(config: &Config, host: &Host) -> Vec<Finding> {
    let others = config.cluster.hosts.iter().filter(|(name, _)| **name != config.this);
    join_all(others.map(|(name, other)| port(host, name, other))).await
}

async fn port(host: &Host, name: &HostName, other: &Host) -> Finding {
    let at = SocketAddr::new(other.ip, other.agent_port);
    let tried = format!("a TCP connection from {} to the agent of {name} at {at}", host.ip);
    let connect = async {
        let socket = if at.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.bind(SocketAddr::new(host.ip, 0))?;
        socket.connect(at).await
    };
    let why = match timeout(CONNECT, connect).await {
        Ok(Ok(_)) => return Finding::ok(Subject::AgentPort, tried, "it is accepted"),
        Ok(Err(e)) => e.to_string(),
        Err(_) => format!("no answer within {} s", CONNECT.as_secs()),
    };
    let cure = format!(
        "start mmm_agentd on {name} and let TCP port {} in from {}: without it {name} cannot vouch for this host",
        at.port(),
        host.ip
    );
    Finding::bad(Severity::Error, Subject::AgentPort, tried, why, cure)
}

/// The cluster's interface, as the parts of an examination need it.
fn interface(host: &Host) -> Addresses {
    Addresses::new(&host.cluster_interface)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::Notify;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (one, two) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (one.unwrap(), two.unwrap().0)
    }

    #[tokio::test]
    async fn one_examination_at_a_time_and_the_clock_first() {
        let go = Arc::new(Notify::new());
        let waits = Arc::clone(&go);
        let examiner = Examiner::new(move || {
            let waits = Arc::clone(&waits);
            async move {
                waits.notified().await;
                Examined { findings: vec![], facts: Facts::default() }
            }
        });
        let (asking, asked) = pair().await;
        let (reading, mut writing) = asked.into_split();
        let first = examiner.clone();
        let task = tokio::spawn(async move { first.serve(&mut writing, Some("another one".to_owned())).await });
        let mut lines = BufReader::new(asking).lines();
        let begun = lines.next_line().await.unwrap().unwrap();
        assert!(begun.starts_with(r#"{"message":"examining","unix_ms":"#), "{begun}");

        let (_other, second) = pair().await;
        let refused = examiner.serve(&mut second.into_split().1, None).await;
        assert!(matches!(&refused, Ended::NotNow(n) if n.told.contains("being examined already")), "{refused:?}");

        go.notify_one();
        assert!(matches!(task.await.unwrap(), Ended::Closed));
        let done = lines.next_line().await.unwrap().unwrap();
        let Ok(FromAgent::Examined(examined)) = serde_json::from_str(&done) else { panic!("{done}") };
        assert_eq!(examined.findings.len(), 1);
        assert_eq!((examined.findings[0].subject, examined.findings[0].severity), (Subject::Agent, Severity::Error));
        drop(reading);

        let (_other, third) = pair().await;
        go.notify_one();
        assert!(matches!(examiner.serve(&mut third.into_split().1, None).await, Ended::Closed), "its turn again");
    }
}
