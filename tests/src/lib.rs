//! What the tests that span crates stand on: [`lab`] has hosts in network namespaces with real servers, [`world`] a
//! simulated cluster around the real cores, and [`chaos`] tells stories in it by chance.

pub mod chaos;
pub mod lab;
pub mod world;
