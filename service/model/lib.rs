//! What a domain or a network *is* and what a driver *can*: plain values, no I/O, no clock.

#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

pub mod backup;
pub mod calendar;
pub mod checkpoint;
pub mod device;
pub mod domain;
pub mod driver;
pub mod keys;
pub mod lock;
pub mod network;
pub mod nodedev;
pub mod secret;
pub mod setting;
pub mod snapshot;
pub mod state;
pub mod storage;
pub mod xml;
