//! Networks changed while they are there, without a guest dropped; and what is stored of them.

use super::{CheckedNetwork, Network, Note};
use crate::authz::Caller;
use crate::error::{Error, Result};
use crate::frames;
use crate::lock::lock;
use crate::object::Usage;
use crate::store::{Folder, on_disk};
use crate::verb::{self, Verb};
use std::net::IpAddr;
use std::sync::Arc;
use virt_model::domain::value::{Mac, Value};
use virt_model::network::NetworkDef;
use virt_model::network::update::{Change, Command, Section};
use virt_model::xml::{Finding, shorten};

/// A reservation, as it is given without XML.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostEntry {
    /// The card.
    pub mac: Mac,
    /// Its address, if it is to have one of its own.
    pub address: Option<IpAddr>,
    /// Its name; empty if it has none.
    pub name: String,
}

impl HostEntry {
    /// Reads what a client gives. Error: `InvalidArgument`.
    pub fn read(mac: &str, address: &str, name: &str) -> Result<HostEntry> {
        let ip = if address.is_empty() { None } else { Some(read("an address", address)?) };
        Ok(HostEntry { mac: read("a card", mac)?, address: ip, name: name.to_owned() })
    }
}

/// Reads one word of a call.
pub(super) fn read<T: Value>(what: &str, text: &str) -> Result<T> {
    T::from_text(text).map_err(|expected| {
        Error::InvalidArgument(format!("'{}' is no name of {what}: give {expected}", shorten(text)))
    })
}

impl Network {
    /// Changes one part, of what there is and of what is stored.
    pub async fn update(
        self: &Arc<Self>,
        caller: &Caller,
        command: &str,
        section: &str,
        xml: &str,
        parent: Option<usize>,
    ) -> Result<()> {
        let (command, section) = (read::<Command>("a command", command)?, read::<Section>("a section", section)?);
        let seat = self.shared.desk.seat(caller.uid, &[xml]).await;
        let text = xml.to_owned();
        let change = seat.work(move || Change::read(command, section, parent, &text)).await;
        let change = change.map_err(Error::ConfigInvalid)?;
        self.alter(caller, &verb::NETWORK_UPDATE, move |def| def.changed(&change)).await
    }

    /// Reserves an address or a name for a card, in place of what there is of it.
    pub async fn set_host(self: &Arc<Self>, caller: &Caller, host: HostEntry) -> Result<()> {
        self.alter(caller, &verb::SET_HOST, move |def| def.with_host(host.mac, host.address, &host.name)).await
    }

    /// Reserves nothing for a card any more.
    pub async fn remove_host(self: &Arc<Self>, caller: &Caller, mac: &str) -> Result<()> {
        let mac: Mac = read("a card", mac)?;
        self.alter(caller, &verb::REMOVE_HOST, move |def| {
            def.without_host(mac).ok_or_else(|| {
                vec![Finding::anywhere(
                    virt_model::xml::FindingKind::Invalid,
                    "/ip/dhcp",
                    format!("nothing is reserved for {mac}"),
                )]
            })
        })
        .await
    }

    /// Changes what is stored and what there is; on failure both are as they were.
    async fn alter(
        self: &Arc<Self>,
        caller: &Caller,
        verb: &Verb,
        change: impl Fn(&NetworkDef) -> Result<NetworkDef, Vec<Finding>> + Send + Sync,
    ) -> Result<()> {
        frames::short(self, caller, verb, async {
            let (stored, live) = {
                let state = lock(&self.state);
                (state.stored.clone(), state.live.clone())
            };
            let new = |def: Option<&Arc<NetworkDef>>| -> Result<Option<Arc<NetworkDef>>> {
                def.map(|def| change(def).map(Arc::new).map_err(Error::ConfigInvalid)).transpose()
            };
            let (new_stored, new_live) = (new(stored.as_ref())?, new(live.as_ref())?);
            if let Some(def) = &new_stored {
                self.store(def).await?;
            }
            crate::fail_point::reached();
            if let Some(def) = &new_live
                && let Err(error) = self.driver().change(def).await
            {
                if let Some(def) = &stored
                    && let Err(why) = self.store(def).await
                {
                    tracing::error!(network = self.name, %why, "its change was refused, and stays in what is stored");
                    self.commit(vec![("defined", "updated")], |state| state.stored = new_stored);
                }
                return Err(self.failed("update", error));
            }
            let devices = self.driver().forward_devices(self.uuid).await;
            self.commit(vec![("defined", "updated")], |state| {
                (state.stored, state.live, state.devices) = (new_stored, new_live, devices.into());
            });
            Ok(())
        })
        .await
    }

    /// Whether it starts with the host.
    pub async fn set_autostart(self: &Arc<Self>, caller: &Caller, on: bool) -> Result<()> {
        frames::short(self, caller, &verb::NETWORK_AUTOSTART, async {
            let (shared, uuid, note) = (self.shared.clone(), self.uuid, Note { owner: self.owner, autostart: on });
            on_disk(move || shared.store.documents(Folder::Networks).save_note(uuid, &note)).await?;
            self.commit(Vec::new(), |state| state.autostart = on);
            Ok(())
        })
        .await
    }

    /// Puts a document on disk, which is known to be read again.
    pub(super) async fn store(&self, def: &NetworkDef) -> Result<()> {
        let text = def.write_readable().map_err(Error::OperationInvalid)?;
        let note = Note { owner: self.owner, autostart: lock(&self.state).autostart };
        let (shared, uuid) = (self.shared.clone(), self.uuid);
        on_disk(move || shared.store.documents(Folder::Networks).save(uuid, &text, &note)).await
    }

    /// Forgets what is stored; what there is goes on until it is destroyed. `force`: also where stored machines name it.
    pub async fn undefine(self: &Arc<Self>, caller: &Caller, force: bool) -> Result<()> {
        frames::short(self, caller, &verb::NETWORK_UNDEFINE, async {
            if !force {
                self.is_not_used("undefine", Usage::Config)?;
            }
            let (shared, uuid) = (self.shared.clone(), self.uuid);
            on_disk(move || shared.store.documents(Folder::Networks).remove(uuid)).await?;
            crate::fail_point::reached();
            self.commit(vec![("undefined", "removed")], |state| {
                (state.stored, state.broken, state.autostart) = (None, None, false);
            });
            Ok(())
        })
        .await
    }

    /// What that would meet.
    pub async fn check_undefine(&self, caller: &Caller, force: bool) -> Result<CheckedNetwork> {
        frames::beside(self, caller, &verb::NETWORK_CHECK_UNDEFINE, async {
            let used = if force { Ok(()) } else { self.is_not_used("undefine", Usage::Config) };
            Ok(CheckedNetwork { refusal: used.err(), users: self.users() })
        })
        .await
    }
}
