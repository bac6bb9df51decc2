//! Asks on the wire whether somebody else has an address.

use crate::netlink::Addresses;
use mmm_agent_core::io::Input;
use std::net::IpAddr;
use tokio::sync::mpsc::UnboundedSender;

pub(crate) struct Prober;

impl Prober {
    pub(crate) fn new(_addresses: Addresses, _inputs: UnboundedSender<Input>) -> Self {
        Prober
    }

    pub(crate) fn probe(&self, ip: IpAddr) {
        tracing::debug!(%ip, "nobody is asked");
    }
}
