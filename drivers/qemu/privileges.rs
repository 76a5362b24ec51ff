//! By whose rights guests run: as we do, or each as a user of its own.

use crate::DriverConfig;
use crate::host::access::Ledger;
use crate::host::lender::Lender;
use crate::host::resolve::Found;
use crate::host::uids::{Uids, range_of};
use crate::host::user::RunAs;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;
use virt_model::driver::DriverError;

/// Whom QEMU runs as.
pub enum Privileges {
    /// As we do.
    Ours,
    /// As users whom only root can run it as.
    Drop(Users),
}

/// The users of guests.
pub struct Users {
    /// Who they are in common. They are looked up at each start: they may be made while virtd runs.
    user: String,
    group: Option<String>,
    /// Where is noted what guests are lent, or why that cannot be read.
    ledger: Result<Arc<Ledger>, String>,
    /// Where is noted whom each guest runs as.
    uids: Result<Arc<Uids>, String>,
}

impl Privileges {
    /// Those that this virtd can give guests. Reads the ledger of lent files and that of users; what cannot be read is logged,
    /// and refuses each start.
    pub fn new(config: &DriverConfig) -> Privileges {
        if !config.system || !nix::unistd::geteuid().is_root() {
            return Privileges::Ours;
        }
        let said = |why: String| {
            tracing::error!("{why}");
            why
        };
        let ledger = Ledger::open(&config.state_dir);
        let uids = range_of(&config.qemu_user).and_then(|range| Uids::open(&config.state_dir, range));
        Privileges::Drop(Users {
            user: config.qemu_user.clone(),
            group: config.qemu_group.clone(),
            ledger: ledger
                .map(Arc::new)
                .map_err(|e| said(format!("the ledger of lent files in {}: {e}", config.state_dir.display()))),
            uids: uids.map(Arc::new).map_err(|e| said(format!("user ids for guests: {e}"))),
        })
    }

    /// As we do.
    pub fn are_ours(&self) -> bool {
        matches!(self, Privileges::Ours)
    }

    /// Where is noted what guests are lent, where they are.
    pub fn ledger(&self) -> Option<&Arc<Ledger>> {
        match self {
            Privileges::Ours => None,
            Privileges::Drop(users) => users.ledger.as_ref().ok(),
        }
    }

    /// Refuses to start guests where their users, or what they are lent, are not known.
    pub fn check(&self) -> Result<(), DriverError> {
        match self {
            Privileges::Ours => Ok(()),
            Privileges::Drop(users) => users.common().map(drop),
        }
    }

    /// By whose rights that machine's guest runs: see [`Users::of`].
    pub fn lender(&self, machine: Uuid, kvm: bool, process: Option<i32>) -> Result<Lender, DriverError> {
        match self {
            Privileges::Ours => Ok(Lender::Ours),
            Privileges::Drop(users) => users.of(machine, kvm, process),
        }
    }

    /// By whose rights tools run that work for no guest: as the user that all guests' users come from, who owns nothing.
    pub fn tools(&self) -> Result<Lender, DriverError> {
        match self {
            Privileges::Ours => Ok(Lender::Ours),
            Privileges::Drop(users) => users.common().map(|(user, ledger)| Lender::To(user, ledger)),
        }
    }

    /// Nothing of that machine is left: its user's number may be another's one day.
    pub fn forget(&self, machine: Uuid) -> Result<(), DriverError> {
        let Privileges::Drop(Users { uids: Ok(uids), .. }) = self else { return Ok(()) };
        uids.free(machine).map_err(|e| DriverError::Storage(format!("user ids of guests: {e}")))
    }

    /// Whom QEMU runs as while it is asked what it can do: the same user, in the group that opens /dev/kvm; nobody while
    /// there is no such user.
    pub fn to_probe(&self) -> Option<(u32, u32)> {
        let Privileges::Drop(Users { user, group, .. }) = self else { return None };
        let user = RunAs::look_up(user, group.as_deref(), &[]);
        let kvm = nix::unistd::Group::from_name("kvm").ok().flatten().map(|group| group.gid.as_raw());
        const NOBODY: (u32, u32) = (65534, 65534);
        Some(user.map_or(NOBODY, |user| (user.uid, kvm.unwrap_or(user.gid))))
    }
}

impl Users {
    /// Who guests were before each had a user of its own, and what lends to them.
    fn common(&self) -> Result<(RunAs, Arc<Ledger>), DriverError> {
        let user = RunAs::look_up(&self.user, self.group.as_deref(), &["kvm"])?;
        Ok((user, self.ledger.clone().map_err(DriverError::Storage)?))
    }

    /// The user of that machine's guest, which has no name. `kvm`: it opens /dev/kvm. A guest whose `process` an earlier virtd
    /// has started as the user of all guests stays that user's.
    fn of(&self, machine: Uuid, kvm: bool, process: Option<i32>) -> Result<Lender, DriverError> {
        let (user, ledger) = self.common()?;
        let owner = process.and_then(|process| Found::resolve(Path::new(&format!("/proc/{process}"))).ok());
        if owner.is_some_and(|owner| owner.stat.st_uid == user.common) {
            return Ok(Lender::To(user, ledger));
        }
        let uids = self.uids.as_ref().map_err(|why| DriverError::Unsupported(why.clone()))?;
        let number = uids.of(machine).map_err(|e| DriverError::Storage(format!("a user id for the guest: {e}")))?;
        Ok(Lender::To(user.with_number(number, if kvm { &[] } else { &["kvm"] }), ledger))
    }
}
