//! The contract for checkpoints: what a driver does to the bitmaps in images that tell what has been written since. Which
//! checkpoints there are is the service's matter.

use super::DriverError;
use super::operation::Machine;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What a driver can do with checkpoints.
#[async_trait]
pub trait Checkpoints: Send + Sync {
    /// Refuses what [`Checkpoints::create_checkpoint`] would refuse. Changes nothing.
    async fn check_create_checkpoint(&self, machine: &Machine, disks: &[TrackedDisk]) -> Result<(), DriverError>;

    /// From one moment on, the same for all these disks, it is kept what is written. All of it or nothing.
    async fn create_checkpoint(&self, machine: &Machine, disks: &[TrackedDisk]) -> Result<(), DriverError>;

    /// That is not kept any more, and what was is forgotten, but for what lies in frozen layers. What is not there is fine.
    async fn delete_checkpoint(&self, machine: &Machine, disks: &[TrackedDisk]) -> Result<(), DriverError>;

    /// Why what is kept of each of these is not to be trusted, by their place; those that are sound are not told.
    async fn doubts(
        &self,
        machine: &Machine,
        checkpoints: &[Vec<TrackedDisk>],
    ) -> Result<BTreeMap<usize, String>, DriverError>;
}

/// A disk of which it is known what has been written since a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackedDisk {
    /// `vda`
    pub target: String,
    /// What its bitmap is called, in each layer from the topmost down to where it began.
    pub bitmap: String,
    /// The layer that was the topmost when it began.
    pub began: PathBuf,
}

/// A bitmap as it lies in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapState {
    /// There is none of that name.
    Missing,
    /// Who wrote to the image last was killed, or does so now.
    Inconsistent,
    /// It does not tell what is written.
    Idle,
    /// It tells all that has been written.
    Sound,
}

impl TrackedDisk {
    /// Why what is kept of it is not to be trusted, if so: in each layer that was written since, the bitmap must be sound, and
    /// the layer in which it began must be among them. `layers`: from the topmost down.
    pub fn doubt(&self, layers: &[PathBuf], state: impl Fn(&Path, &str) -> BitmapState) -> Option<String> {
        let TrackedDisk { target, bitmap, began } = self;
        for layer in layers {
            let file = layer.display();
            match state(layer, bitmap) {
                BitmapState::Sound if layer == began => return None,
                BitmapState::Sound => {}
                BitmapState::Missing => {
                    return Some(format!("disk '{target}': {file} does not hold the bitmap '{bitmap}'"));
                }
                BitmapState::Inconsistent => {
                    return Some(format!(
                        "disk '{target}': the bitmap '{bitmap}' in {file} is inconsistent, since what wrote to the image did \
                         not come to its end in order"
                    ));
                }
                BitmapState::Idle => {
                    return Some(format!(
                        "disk '{target}': the bitmap '{bitmap}' in {file} was not kept while it was written"
                    ));
                }
            }
        }
        Some(format!("disk '{target}' does not stand on {} any more", began.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_layer_down_to_where_it_began_is_looked_at() {
        let disk = TrackedDisk { target: "vda".into(), bitmap: "b".into(), began: "/base".into() };
        let layers = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        let sound = |_: &Path, _: &str| BitmapState::Sound;
        assert_eq!(disk.doubt(&layers(&["/over", "/base", "/older"]), sound), None);
        assert!(disk.doubt(&layers(&["/over"]), sound).unwrap().contains("stand on /base"));
        for (bad, word) in [
            (BitmapState::Missing, "not hold"),
            (BitmapState::Inconsistent, "inconsistent"),
            (BitmapState::Idle, "not kept"),
        ] {
            let in_base = |file: &Path, _: &str| if file == Path::new("/base") { bad } else { BitmapState::Sound };
            assert!(disk.doubt(&layers(&["/over", "/base"]), in_base).unwrap().contains(word));
            // What lies below where it began has no part in it.
            let below = |file: &Path, _: &str| if file == Path::new("/older") { bad } else { BitmapState::Sound };
            assert_eq!(disk.doubt(&layers(&["/base", "/older"]), below), None);
        }
    }
}
