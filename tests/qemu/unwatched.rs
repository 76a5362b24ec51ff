//! What a pool of this host's is told where no daemon tells it (`shares.rs`, `volume_group.rs`): work, and what volume is to be made.

use tokio_util::sync::CancellationToken;
use virt_model::driver::DriverError;
use virt_model::driver::storage::{Content, FileId, NewVolume, Preallocation, Qcow2Options, Work};

/// Work that nobody watches.
#[derive(Default)]
pub struct Unwatched(pub CancellationToken);

impl Work for Unwatched {
    fn progress(&self, done: u64, total: u64) {
        // Of how many it is one may not know.
        assert!(total == 0 || done <= total, "{done} of {total}");
    }

    fn step(&self) {}

    fn grows(&self, _: u64) -> Result<(), DriverError> {
        Ok(())
    }

    fn names(&self, id: FileId, name: &str, format: &str, _: Option<&str>) -> Result<(), DriverError> {
        assert!(id.number > 0 && !name.is_empty() && format == "raw");
        Ok(())
    }

    fn cancelled(&self) -> &CancellationToken {
        &self.0
    }
}

/// A raw one.
pub fn new_volume(name: &str, capacity: u64, content: Content) -> NewVolume {
    NewVolume {
        name: name.to_owned(),
        format: "raw".to_owned(),
        capacity,
        allocation: 0,
        preallocation: Preallocation::Off,
        qcow2: Qcow2Options::default(),
        nocow: false,
        owner: (None, None),
        mode: 0o600,
        secret: None,
        content,
    }
}
