//! A device of whatever kind. Each kind stands in one list, so what is done to all devices is a loop and a match, and a match that
//! forgets a kind does not compile.

use super::{
    Channel, Console, Controller, Crypto, DeviceInfo, Devices, Disk, Filesystem, Hostdev, Hub, Input, Interface, Iommu,
    Memballoon, MemoryDevice, Panic, Parallel, Redirdev, Rng, Serial, Shmem, Sound, Tpm, Video, Vsock, Watchdog,
};
use crate::xml::Place;

macro_rules! devices {
    ($($kind:ident in $list:ident;)+) => {
        /// The kinds of devices that have a name and a place on a bus.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs, reason = "the words say it")]
        pub enum DeviceKind { $($kind,)+ }

        /// Any device.
        #[derive(Clone, Copy, Debug)]
        #[allow(missing_docs, reason = "the words say it")]
        pub enum Device<'a> { $($kind(&'a $kind),)+ }

        /// Any device, to be changed.
        #[derive(Debug)]
        #[allow(missing_docs, reason = "the words say it")]
        pub enum DeviceMut<'a> { $($kind(&'a mut $kind),)+ }

        impl Devices {
            /// All that have a name and a place on a bus: kind by kind, within one in the document's order.
            pub fn all(&self) -> Vec<Device<'_>> {
                let mut all = Vec::new();
                $(all.extend(self.$list.iter().map(Device::$kind));)+
                all
            }

            /// The same, to be changed.
            pub fn all_mut(&mut self) -> Vec<DeviceMut<'_>> {
                let mut all = Vec::new();
                $(all.extend(self.$list.iter_mut().map(DeviceMut::$kind));)+
                all
            }
        }

        impl<'a> Device<'a> {
            /// Name, turn and place on a bus, and where in the document the device stands.
            pub fn info(self) -> (&'a DeviceInfo, &'a Place) {
                match self { $(Device::$kind(device) => (&device.info, &device.at),)+ }
            }
        }

        impl<'a> DeviceMut<'a> {
            /// What it is.
            pub fn kind(&self) -> DeviceKind {
                match self { $(DeviceMut::$kind(_) => DeviceKind::$kind,)+ }
            }

            /// Name, turn and place on a bus, and where in the document the device stands.
            pub fn into_info(self) -> (&'a mut DeviceInfo, &'a Place) {
                match self { $(DeviceMut::$kind(device) => (&mut device.info, &device.at),)+ }
            }
        }
    };
}

devices! {
    Disk in disks;
    Controller in controllers;
    Filesystem in filesystems;
    Interface in interfaces;
    Serial in serials;
    Parallel in parallels;
    Console in consoles;
    Channel in channels;
    Input in inputs;
    Tpm in tpms;
    Sound in sounds;
    Video in videos;
    Hostdev in hostdevs;
    Redirdev in redirdevs;
    Hub in hubs;
    Watchdog in watchdogs;
    Memballoon in memballoon;
    Rng in rngs;
    Panic in panics;
    Shmem in shmems;
    MemoryDevice in memories;
    Crypto in cryptos;
    Iommu in iommus;
    Vsock in vsock;
}

impl Devices {
    /// All devices, to be changed: kinds in the given order, and behind them those that it does not name.
    pub fn all_mut_in(&mut self, order: &[DeviceKind]) -> Vec<DeviceMut<'_>> {
        let mut all = self.all_mut();
        let turn = |kind| order.iter().position(|named| *named == kind).unwrap_or(order.len());
        all.sort_by_key(|device| turn(device.kind()));
        all
    }

    /// Name, turn and place of every device, with where it stands.
    pub fn infos(&self) -> Vec<(&DeviceInfo, &Place)> {
        self.all().into_iter().map(Device::info).collect()
    }

    /// The same, to be changed.
    pub fn infos_mut(&mut self) -> Vec<&mut DeviceInfo> {
        self.all_mut().into_iter().map(|device| device.into_info().0).collect()
    }
}
