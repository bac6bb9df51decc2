//! The real slots as small values: host names are numbers, times are ticks from now, epochs are ranks. A state of layer A
//! is made of these, and `wake.rs` makes real slots of them for each step.

/// The most hosts that a run can have.
pub(crate) const MOST: usize = 3;

pub(crate) type Id = u8;
/// One bit per host.
pub(crate) type Set = u8;

pub(crate) fn has(set: Set, id: Id) -> bool {
    set >> id & 1 == 1
}

/// Names one report or request: when it was sent, and whether by the present life of its agent.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Anchor {
    pub age: i8,
    pub old_life: bool,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lease {
    /// So many ticks are left; zero: over.
    Ticks(i8),
    Inherited,
}

/// The hold order of an agent; its epoch is `Agent::seen`.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Hold {
    pub granters: Set,
    pub proof: bool,
    pub lease: Lease,
    /// How long each host's vouches let the lease run; zero: no longer than it runs already.
    pub vouches: [i8; MOST],
}

#[derive(Clone, Copy, Debug, Default, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Agent {
    /// The agent's real slot.
    pub seen: u8,
    pub hold: Option<Hold>,
    /// Ticks until its promises are over.
    pub vouched: i8,
    /// Whether it believes the address to be on the machine.
    pub present: bool,
    /// The machine's kernel: the address is there for so many ticks more. Below zero: the kernel is late.
    pub kernel: Option<i8>,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Granters {
    Known(Set),
    Unknown,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Given {
    pub epoch: u8,
    pub to: Id,
    pub granters: Granters,
}

/// The monitor's real slot.
#[derive(Clone, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Decided {
    pub epoch: u8,
    pub holder: Option<Id>,
    /// The decision by which the holder got it; 0 without a holder.
    pub given: u8,
    pub live: Vec<Given>,
    /// Ticks until the leases that it gave to each host are over.
    pub wait: [i8; MOST],
}
