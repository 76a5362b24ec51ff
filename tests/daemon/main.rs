//! The whole daemon on a private bus: bus policy, polkit, and virtd with the test driver.

#[path = "../common/mod.rs"]
mod common;

mod adjust;
mod agent;
mod backups;
mod block_jobs;
mod bus_objects;
mod bus_policy;
mod bus_prompt;
mod checkpoints;
mod console;
mod devices;
mod documents;
mod flood;
mod journal;
mod networks;
mod networks_firewalld;
mod nodedev;
mod permission;
mod records;
mod rules;
mod saved;
mod secrets;
mod shown;
mod snapshots;
mod soak;
mod startup;
mod stats;
mod storage;
mod storage_disks;
mod storage_fs;
mod storage_logical;
mod storage_nbd;
mod storage_netfs;
mod storage_partitions;
mod storage_quotas;
mod storage_volumes;
mod stranger;
mod subscribed;
mod truth;
