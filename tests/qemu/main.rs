//! The whole daemon with real QEMU guests; without KVM but for those of `kvm.rs`.

#[path = "../common/mod.rs"]
mod common;

mod adjusted;
mod backups;
mod backups_failed;
mod checkpoints;
mod console;
mod dead_storage;
mod disks_cut_off;
mod disks_moved;
mod dumped;
mod hostile_images;
mod hotplug;
mod hung;
mod images_in_use;
mod kvm;
mod lifecycle;
mod media;
mod missing;
mod networks;
mod networks_own;
mod parts;
mod plugged;
mod records;
mod revert_matrix;
mod saved;
mod saved_given;
mod saved_managed;
mod saved_unfinished;
mod serial;
mod shares;
mod snapshots;
mod snapshots_cpu;
mod snapshots_cut_off;
mod snapshots_deleted;
mod snapshots_kept;
mod snapshots_unfinished;
mod stats;
mod survival;
mod system;
mod taken;
mod undefine;
mod unread;
mod volumes;
mod whole_machine;
