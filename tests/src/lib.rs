//! What the tests that span crates stand on: [`lab`] has hosts in network namespaces with real servers, [`world`] a
//! simulated cluster around the real cores, [`stories`] has the words in which tests tell what happens there, and [`chaos`]
//! tells stories in it by chance, looked at by the rules in `invariants`.

pub mod chaos;
mod invariants;
pub mod lab;
pub mod scenario;
pub mod stories;
pub mod world;
