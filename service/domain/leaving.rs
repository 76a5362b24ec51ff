//! What a guest was asked to let go of and has still, devices and vCPUs: it lets go whenever it likes, and what is stored follows
//! then, whichever virtd hears of it. So it stands in the guest's status before the guest is asked, until what is stored has followed.

use super::Domain;
use super::adjust::VCPUS_LEAVING;
use super::config::Update;
use super::state::Guest;
use crate::error::Result;
use crate::lock::lock;
use crate::store::on_disk;
use std::collections::BTreeMap;
use std::sync::Arc;
use virt_model::xml::{self, Element};

impl Domain {
    /// The guest is about to be asked to let go of what has that name; `stored`: the element that then goes from what is stored, too.
    /// Error: that cannot be kept, and nothing is to come of it.
    pub(super) async fn will_go(self: &Arc<Self>, id: u32, name: &str, stored: Option<Element>) -> Result<()> {
        let Some(before) = self.with_leaving(id, |leaving| leaving.insert(name.to_owned(), stored)) else {
            return Ok(());
        };
        let kept = self.keep_leaving(id).await;
        if kept.is_err() {
            self.with_leaving(id, |leaving| match before {
                Some(before) => leaving.insert(name.to_owned(), before),
                None => leaving.remove(name),
            });
        }
        kept
    }

    /// Nothing is to come of that any more. Gives whether the guest had been asked.
    pub(super) async fn stays(self: &Arc<Self>, id: u32, name: &str) -> bool {
        let was_asked = self.with_leaving(id, |leaving| leaving.remove(name)).flatten().is_some();
        if was_asked && let Err(error) = self.keep_leaving(id).await {
            tracing::warn!(uuid = %self.uuid, %error, "after a restart of virtd '{name}' is taken for what the guest was asked for");
        }
        was_asked
    }

    /// What goes from what is stored, too, when the guest lets go of that.
    pub(super) fn stored_that_goes(&self, id: u32, name: &str) -> Option<Element> {
        let state = lock(&self.state);
        state.guest.as_ref().filter(|guest| guest.id == id)?.leaving.get(name)?.clone()
    }

    /// Of a guest that was found: what it has let go of before the last virtd had put that into what is stored. For who has the turn.
    pub(super) async fn leaves_as_found(self: &Arc<Self>, guest: &Guest) {
        if guest.leaving.contains_key(VCPUS_LEAVING) {
            tokio::spawn(self.clone().vcpus_have_changed(guest.id));
        }
        for (name, element) in &guest.leaving {
            let there = guest.live.devices.infos().iter().any(|(info, _)| info.alias() == Some(name));
            if there || name == VCPUS_LEAVING {
                continue;
            }
            let stored = self.stored().ok().flatten().zip(element.as_ref());
            let without = stored.and_then(|(def, element)| self.stored_without(&def, element).ok());
            if without.is_some()
                && let Err(error) = self.put_configurations(None, without, Update::Whole).await
            {
                tracing::error!(uuid = %self.uuid, name = self.name(), %error, "'{name}' has gone, and what is stored does not follow");
                continue;
            }
            self.stays(guest.id, name).await;
        }
    }

    fn with_leaving<T>(&self, id: u32, change: impl FnOnce(&mut BTreeMap<String, Option<Element>>) -> T) -> Option<T> {
        let mut state = lock(&self.state);
        let guest = state.guest.as_mut().filter(|guest| guest.id == id)?;
        Some(change(&mut guest.leaving))
    }

    /// Writes what is so when it is written, so that what is written last is what is so.
    async fn keep_leaving(self: &Arc<Self>, id: u32) -> Result<()> {
        let Some(status) = self.guest().ok().filter(|guest| guest.id == id).map(|guest| guest.status) else {
            return Ok(());
        };
        let domain = self.clone();
        on_disk(move || {
            status.update(|status| {
                let texts = |leaving: &mut BTreeMap<String, Option<Element>>| {
                    leaving.iter().map(|(name, element)| (name.clone(), element.as_ref().map(Element::write))).collect()
                };
                status.leaving = domain.with_leaving(id, texts).unwrap_or_default();
            })
        })
        .await
    }
}

/// The same as it stands in a status.
pub(super) fn leaving_of(texts: &BTreeMap<String, Option<String>>) -> BTreeMap<String, Option<Element>> {
    let read = |text: &String| xml::read(text, &[]).ok();
    texts.iter().map(|(name, text)| (name.clone(), text.as_ref().and_then(read))).collect()
}
