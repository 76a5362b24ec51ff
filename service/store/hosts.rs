//! What other hosts had when they were last seen, so that their machines are there while they do not answer: for each host a folder
//! of documents, `<state>/hosts/<name>/`, that nobody else changes. It is a cache: what a host says counts.

use super::{Documents, Store};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use uuid::Uuid;
use virt_model::state::{DomainState, StateReason};

/// What is noted of a machine of another host beside its configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct HostedNote {
    /// By what its host knows it.
    pub key: String,
    /// What its host calls it; here it may have another name.
    pub name: String,
    /// What it did.
    pub state: DomainState,
    /// Why.
    pub reason: StateReason,
    /// Since when.
    pub since_usec: u64,
}

impl Default for HostedNote {
    /// Of a machine whose note is lost: it is not known which it is.
    fn default() -> HostedNote {
        let (key, name) = (String::new(), String::new());
        HostedNote { key, name, state: DomainState::Shutoff, reason: StateReason::Unknown, since_usec: 0 }
    }
}

impl Store {
    /// The machines of a host, by its name, which is one that a folder may have. Makes the folder. Blocks.
    pub fn hosted(&self, host: &str) -> Result<Documents> {
        let folder = self.paths.state.join("hosts").join(host);
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.and_then(|()| super::remove_unfinished(&folder))
            .map_err(|e| Error::from_io("make the folder", &folder, &e))?;
        Ok(Documents(folder))
    }

    /// The names of hosts of which something is kept. Blocks.
    pub fn hosts_kept(&self) -> Vec<String> {
        let entries = fs::read_dir(self.paths.state.join("hosts")).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// Forgets a host that is not configured any more. Blocks.
    pub fn forget_host(&self, host: &str) -> Result<()> {
        let folder = self.paths.state.join("hosts").join(host);
        fs::remove_dir_all(&folder).map_err(|e| Error::from_io("remove", &folder, &e))
    }
}

/// A change of what is kept of a host.
#[derive(Debug)]
pub(crate) enum HostedChange {
    /// A machine is so.
    Is(Uuid, String, HostedNote),
    /// It is there no more.
    Gone(Uuid),
}

impl HostedChange {
    /// Of which machine.
    pub fn uuid(&self) -> Uuid {
        match self {
            HostedChange::Is(uuid, ..) | HostedChange::Gone(uuid) => *uuid,
        }
    }
}

impl Documents {
    /// Keeps a change. Blocks.
    pub fn keep_hosted(&self, change: HostedChange) -> Result<()> {
        match change {
            HostedChange::Is(uuid, text, note) => self.save(uuid, &text, &note),
            HostedChange::Gone(uuid) => self.remove(uuid),
        }
    }
}
