//! What the stories of the simulated cluster say over and over: how a cluster comes up, what an operator asks, and what is
//! to be seen then. A failed assertion shows the whole story.

use crate::world::{WRITER, World, config};
use mmm_common::config::{Cluster, Monitor};
use mmm_common::control::Command;
use mmm_common::ids::HostName;
use mmm_common::state::HostMode;

pub const HOSTS: [&str; 3] = ["db1", "db2", "db3"];

/// Two masters and a slave, all ONLINE, db1 writing.
pub fn cluster() -> World {
    cluster_of(World::with(config(&HOSTS)))
}

/// All ONLINE, db1 writing.
pub fn cluster_of(mut w: World) -> World {
    w.run(2_500);
    let names: Vec<HostName> = w.hosts.keys().cloned().collect();
    for host in names {
        set_online(&mut w, host.as_str());
        w.run(2_000);
    }
    w.run(6_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    w.outage = 0;
    w
}

/// These are masters and may have the writer; `hosts` take part.
pub fn masters(hosts: &[&str], masters: &[&str]) -> Monitor {
    let mut c = config(hosts);
    let Cluster { hosts, roles, .. } = &mut c.cluster;
    for (name, host) in hosts {
        host.mode = if masters.contains(&name.as_str()) { HostMode::Master } else { HostMode::Slave };
    }
    roles.get_mut(&"writer".into()).expect("the role").hosts = masters.iter().map(|m| (*m).into()).collect();
    c
}

pub fn told(w: &World) -> String {
    w.story.join("\n")
}

/// In how many lines of the story this stands.
pub fn times(w: &World, text: &str) -> usize {
    w.story.iter().filter(|line| line.contains(text)).count()
}

#[track_caller]
pub fn set_online(w: &mut World, host: &str) {
    let answer = w.text(Command::SetOnline { host: host.into(), accept_lost: false });
    assert!(answer.starts_with("OK"), "{answer}\n{}", told(w));
}

#[track_caller]
pub fn set_offline(w: &mut World, host: &str) {
    let answer = w.text(Command::SetOffline { host: host.into() });
    assert!(answer.starts_with("OK"), "{answer}\n{}", told(w));
}

#[track_caller]
pub fn reclone(w: &mut World, host: &str, from: &str) {
    let answer = w.text(Command::Reclone { host: host.into(), from: from.into() });
    assert!(answer.starts_with("OK"), "{answer}\n{}", told(w));
}

pub fn move_writer(to: &str, force: bool) -> Command {
    Command::MoveRole { role: "writer".into(), host: to.into(), force }
}

#[track_caller]
pub fn shows(w: &mut World, text: &str) {
    let show = w.show();
    assert!(show.contains(text), "'{text}' is not in\n{show}\n{}", told(w));
}

#[track_caller]
pub fn shows_not(w: &mut World, text: &str) {
    let show = w.show();
    assert!(!show.contains(text), "'{text}' is in\n{show}\n{}", told(w));
}

/// db2 is given the writer, opens and writes, and the monitor does not know yet that it is open.
#[track_caller]
pub fn opened_unseen(w: &mut World) {
    let wrote = |w: &World| w.acknowledged.iter().any(|(server, _)| *server == 2);
    w.run_until(20_000, wrote).expect("db2 is open");
    assert_eq!(times(w, "The writer is open on db2"), 0, "the monitor knows already\n{}", told(w));
}
