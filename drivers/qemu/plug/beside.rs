//! What a device needs beside QEMU, from before it is plugged in until it has gone: programs, room for what is thrown away, and
//! what the guest's processes are allowed.

use crate::host::access::LentFile;
use crate::host::process;
use crate::host::workers::{ClosedAside, Errand, blocking};
use crate::qemu::beside::Side;
use crate::qemu::beside::storage;
use crate::qemu::companion::{Gifts, end_all};
use crate::qemu::instance::{Body, guard};
use crate::qemu::plan::{Companion, Link};
use crate::qemu::qmp::COMMAND_TIMEOUT;
use crate::qemu::tune::{Bounds, Tuning};
use crate::qemu::{QemuDriver, command, given, make};
use serde_json::{Value, json};
use std::sync::Arc;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;

impl QemuDriver {
    /// Starts a program that is to run for as long as the guest has a device; gives what QEMU is to have of it.
    pub(super) async fn start_beside(
        &self,
        body: &Arc<Body>,
        def: &DomainDef,
        companion: &Companion,
        lent: &[LentFile],
    ) -> Result<Gifts, DriverError> {
        let lender = self.lender(def, body.keeper.process_id()).await?;
        let lost = || DriverError::Storage("the log of the guest is not there, to which its programs print".to_owned());
        let side = Arc::new(Side {
            uuid: body.uuid,
            lender: lender.clone(),
            own: body.leavings.own_dir(),
            bounds: Bounds::of(def, self.0.bounds.0, self.0.bounds.1),
            output: body.log.output().ok_or_else(lost)?,
        });
        let (one, state_dir, guest) = (companion.clone(), self.0.state_dir.clone(), body.uuid);
        let prepare =
            move |_: &_| one.prepare(lender.user(), &state_dir, guest).map_err(|(path, error)| storage(&path, &error));
        let (own, qemus) = self.0.workers.run(Errand::new(guest, &companion.name), prepare).await?;
        let living = side.start(&body.keeper, companion, own, lent.to_vec()).await?;
        match body.companions.add(living) {
            Ok(living) => drop(tokio::spawn(guard(Arc::downgrade(body), living))),
            Err(living) => {
                end_all(&[living]).await;
                return Err(DriverError::Gone);
            }
        }
        Ok(qemus)
    }

    /// Ends those programs, and removes what they were reached by.
    pub(super) async fn end_beside(&self, body: &Arc<Body>, companions: &[Companion]) {
        for companion in companions {
            if let Some(living) = body.companions.take(&companion.name) {
                end_all(&[living]).await;
            }
            let (name, wary) = (companion.name.clone(), !self.0.privileges.are_ours());
            let mut sockets = Vec::new();
            for link in &companion.links {
                if let Link::Listening { path, .. } = link {
                    sockets.push(path.clone());
                }
            }
            let removed = blocking(move || sockets.iter().try_for_each(|socket| make::remove_file(socket, wary)));
            let forgotten = body.keeper.change(move |record| record.companions.retain(|one| one.name != name)).await;
            if let Err(error) = removed.await.and_then(|removed| removed).and(forgotten) {
                tracing::warn!(uuid = %body.uuid, name = companion.name, %error, "something of what ran beside the guest stays");
            }
        }
    }

    /// Gives QEMU a file without a name, for what the guest writes to the disk of that target and is thrown away.
    pub(super) async fn give_scratch(
        &self,
        body: &Body,
        def: &DomainDef,
        (set, target): (u32, &str),
        done: &mut Vec<(&'static str, Value)>,
    ) -> Result<(), DriverError> {
        let lender = self.lender(def, body.keeper.process_id()).await?;
        let folder = self.0.state_dir.clone();
        let made = blocking(move || make::scratch(&folder, lender.user()).map_err(|e| storage(&folder, &e))).await??;
        let arguments = json!({ "fdset-id": set, "opaque": given::whose(target) });
        done.push(("remove-fd", json!({ "fdset-id": set })));
        let file = vec![ClosedAside::of(made.into())];
        body.monitor()?.execute_with("add-fd", arguments, file, COMMAND_TIMEOUT).await?;
        Ok(())
    }

    /// Lets the guest's processes have what its machine has more, as a start would: its own limit stays what it is.
    pub(super) async fn has_more_memory(&self, body: &Body, def: &DomainDef) -> Result<(), DriverError> {
        let bounds = Bounds::of(def, self.0.bounds.0, self.0.bounds.1);
        let bounds = Bounds { memory: Tuning::of(def).limits.memory.unwrap_or(bounds.memory), ..bounds };
        let (apart, guest) = (!self.0.privileges.are_ours(), body.uuid);
        let locked = command::lock_limit(def).zip(body.keeper.process_id());
        let allowed = blocking(move || {
            if apart {
                bounds.hold_anew(guest);
            }
            locked.map_or(Ok(()), |(bytes, pid)| process::may_lock(pid, Some(bytes)))
        });
        allowed
            .await?
            .map_err(|e| DriverError::Unsupported(format!("QEMU cannot be let keep more memory in place: {e}")))
    }

    /// Lets QEMU keep no more memory in place than its machine needs without a device that has gone.
    pub(super) async fn keeps_less_in_place(&self, body: &Body, before: &DomainDef, rest: &DomainDef) {
        let limit = command::lock_limit(rest);
        let Some(pid) = body.keeper.process_id().filter(|_| limit < command::lock_limit(before)) else { return };
        let lowered = blocking(move || process::may_lock(pid, limit).map_err(|e| DriverError::Internal(e.to_string())));
        if let Err(error) = lowered.await.and_then(|lowered| lowered) {
            tracing::warn!(uuid = %body.uuid, %error, "QEMU may keep memory in place that it does not need any more");
        }
    }
}
