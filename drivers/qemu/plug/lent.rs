//! Files that a device needs are lent to a guest that runs, and given back.

use crate::host::access::LentFile;
use crate::host::wall;
use crate::host::workers::Errand;
use crate::qemu::command;
use crate::qemu::given;
use crate::qemu::instance::Body;
use crate::qemu::launch::{self, MONITOR_FD};
use crate::qemu::plan::HostFile;
use crate::qemu::{QemuDriver, check, make, needs};
use std::collections::BTreeSet;
use std::path::PathBuf;
use virt_model::domain::DomainDef;
use virt_model::driver::DriverError;

impl QemuDriver {
    /// Makes files accessible to a running guest in addition to what it has; gives them.
    pub(in crate::qemu) async fn lend_to(
        &self,
        body: &Body,
        def: &DomainDef,
        files: Vec<HostFile>,
    ) -> Result<Vec<LentFile>, DriverError> {
        let process = body.keeper.process_id();
        let lender = self.lender(def, process).await?;
        let guest = def.uuid;
        let what = files.first().map(|file| file.path.display().to_string()).unwrap_or_default();
        let lend = move |_: &_| {
            for file in files.iter().filter(|file| file.create) {
                let made = make::output(&file.path, lender.user());
                made.map_err(|e| DriverError::Storage(format!("{}: {e}", file.path.display())))?;
            }
            needs::are_as_expected(&files)?;
            let wants = files.iter().map(launch::want).collect::<Vec<_>>();
            let files = lender.lend_more(guest, &wants)?;
            let shown = process.map_or(Ok(()), |process| wall::show(process, &files));
            shown.map_err(|e| DriverError::Storage(format!("the guest cannot be shown a file: {e}")))?;
            Ok(files)
        };
        self.0.workers.run(Errand::new(guest, what), lend).await
    }

    /// Gives back files that nothing else in `rest` needs. A file system that does not answer keeps them lent until the end.
    pub(in crate::qemu) async fn give_back(&self, body: &Body, rest: &DomainDef, files: Vec<PathBuf>) {
        let Some(ledger) = self.0.privileges.ledger().cloned() else { return };
        let caps = self.learnt_for(rest).await;
        let own = body.leavings.own_dir();
        let Ok(needed) =
            check::checked_command(&given::as_shown(rest), &caps, &command::Place::now(&own, MONITOR_FD, true))
        else {
            return;
        };
        let beside = needed.companions.iter().flat_map(|companion| &companion.files);
        let needed: BTreeSet<PathBuf> = needed.files.iter().chain(beside).map(|file| file.path.clone()).collect();
        let free: Vec<PathBuf> = files.into_iter().filter(|path| !needed.contains(path)).collect();
        let Some(first) = free.first() else { return };
        let (errand, guest) = (Errand::new(rest.uuid, first.display().to_string()), rest.uuid);
        let given = self.0.workers.run(errand, move |_| {
            ledger.give_back_these(guest, &free, &needed);
            Ok(())
        });
        if let Err(error) = given.await {
            tracing::warn!(uuid = %guest, %error, "what a device had is given back when the guest ends");
        }
    }
}
