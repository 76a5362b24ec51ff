//! What a device of the host's that is plugged in needs before QEMU is told of it, and what becomes of that.

use crate::host::access::LentFile;
use crate::host::wall;
use crate::host::workers::blocking;
use crate::qemu::beside::unshown;
use crate::qemu::changes::SYSFS;
use crate::qemu::instance::Body;
use crate::qemu::plan::Tap;
use crate::qemu::taking::Taking;
use crate::qemu::{QemuDriver, hostdev};
use std::io;
use std::path::{Path, PathBuf};
use virt_model::device::Device;
use virt_model::domain::DomainDef;
use virt_model::domain::one_device::alias_of;
use virt_model::driver::DriverError;

/// The machine as QEMU is told of it when that device comes: with the place on the host that a USB device has now.
/// Errors: it is not plugged into the host, or there are two.
pub async fn found(def: &DomainDef, alias: &str, sysfs: &Path) -> Result<DomainDef, DriverError> {
    let is_usb = |device: &Device| matches!(device, Device::Hostdev(host) if host.pci().is_none());
    if !def.device_named(alias).as_ref().is_some_and(is_usb) {
        return Ok(def.clone());
    }
    let (mut only, sysfs) = (only(def, alias)?, sysfs.to_owned());
    let place = blocking(move || hostdev::find_usb(&mut only, &sysfs, false).map(|places| places.written_into(&only)));
    let only = place.await?.map_err(DriverError::Config)?;
    let Some(source) = only.devices.hostdevs.into_iter().next().and_then(|device| device.source) else {
        let why = format!("'{alias}' is not plugged into the host, so that there is nothing to give the guest");
        return Err(DriverError::Unsupported(why));
    };
    let mut def = def.clone();
    let ours = def.devices.hostdevs.iter_mut().find(|device| device.info.alias() == Some(alias));
    ours.into_iter().for_each(|device| device.source = Some(source.clone()));
    Ok(def)
}

/// Nothing but that device.
fn only(def: &DomainDef, alias: &str) -> Result<DomainDef, DriverError> {
    def.without_devices(|_, element| alias_of(element) != Some(alias)).map_err(DriverError::Config)
}

/// Whether its QEMU reads of it in the host's `/sys`.
fn is_on_pci(device: &Device) -> bool {
    match device {
        Device::Hostdev(device) => device.pci().is_some(),
        Device::Interface(card) => card.host_card().is_some(),
        _ => false,
    }
}

impl QemuDriver {
    /// Takes from the host what that device of `started` needs, which has been found. On failure nothing of it is taken.
    pub(super) async fn takes(
        &self,
        body: &Body,
        (started, alias): (&DomainDef, &str),
        taps: Vec<Tap>,
        sysfs: &Path,
    ) -> Result<Taking, DriverError> {
        let only = only(started, alias)?;
        if hostdev::takes_nothing(&only, &taps) {
            return Ok(Taking::default());
        }
        let (uuid, claims, sysfs) = (body.uuid, body.leavings.claims.clone(), sysfs.to_owned());
        let taken = async {
            let claim = move || Taking::claim(&only, &taps, uuid, &claims, &sysfs);
            let taking = blocking(claim).await??;
            taking.make(&body.keeper).await?;
            if started.device_named(alias).as_ref().is_some_and(is_on_pci) {
                self.show_the_kernel(body).await?;
            }
            Ok(taking)
        };
        match taken.await {
            Ok(taking) => Ok(taking),
            Err(error) => {
                body.gives_up(alias).await;
                Err(error)
            }
        }
    }

    /// Shows a guest behind its wall what the kernel says of the host's devices, as one that has such a device from its start sees it.
    async fn show_the_kernel(&self, body: &Body) -> Result<(), DriverError> {
        let Some(pid) = body.keeper.process_id() else { return Ok(()) };
        let wary = !self.0.privileges.are_ours();
        let show = move || {
            let sysfs = Path::new(SYSFS);
            let found = if wary { LentFile::unlent(sysfs, false) } else { LentFile::ours(sysfs, false) }?;
            wall::show(pid, &found.into_iter().collect::<Vec<_>>())
        };
        let shown: io::Result<()> = blocking(show).await?;
        shown.map_err(|e| unshown("QEMU", &e))
    }

    /// That device is not the guest's any more: what it had of the host's is given up, and its files are given back, of which `rest`
    /// may need some.
    pub(super) async fn is_not_had(&self, body: &Body, rest: &DomainDef, alias: &str, mut files: Vec<PathBuf>) {
        files.extend(body.gives_up(alias).await);
        self.give_back(body, rest, files).await;
    }
}
