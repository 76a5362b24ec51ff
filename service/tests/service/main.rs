//! The service as its callers see it, a file per story: with the test driver, without a bus and without QEMU.

mod checkpoints;
mod destroy;
mod devices;
mod documents;
mod lifecycle;
mod networks;
mod nodedev;
mod pending;
mod permission;
mod quotas;
mod restart;
mod snapshots;
mod stats;
mod undefine;
mod world;
