//! The TPM and what plays it.

use super::Check;
use crate::qemu::command::tpm_device;
use virt_model::device::Tpm;
use virt_model::device::chardev::SocketMode;
use virt_model::device::tpm::{TpmKind, TpmModel, TpmSourceKind, TpmVersion};

impl Check<'_> {
    pub(super) fn tpms(&mut self) {
        for (n, tpm) in self.def.devices.tpms.iter().enumerate() {
            self.refuse_if(n > 0, &tpm.at, "a machine has one TPM");
            match tpm_device(tpm.model.unwrap_or_default()) {
                Some(device) => self.need_device(&tpm.at, device),
                None => {
                    self.refuse(&tpm.at.attribute("model"), "PC machines have TPMs of model 'tpm-tis' or 'tpm-crb'")
                }
            }
            match tpm.backend.kind {
                TpmKind::Emulator => self.emulated_tpm(tpm),
                TpmKind::External => self.external_tpm(tpm),
                // Two drivers of one chip would destroy each other's sessions; and the table refuses its device.
                TpmKind::Passthrough => self.refuse(
                    &tpm.backend.at.attribute("type"),
                    "type='passthrough' is not supported: the TPM is the host's own; use type='emulator'",
                ),
            }
        }
    }

    fn emulated_tpm(&mut self, tpm: &Tpm) {
        let (back_end, place) = (&tpm.backend, &tpm.backend.at);
        let site = &self.caps.site;
        let (no_emulator, no_setup) = (site.swtpm.is_none(), site.swtpm_setup.is_none());
        self.refuse_if(
            no_emulator,
            &place.attribute("type"),
            "type='emulator' needs swtpm, which is not installed: install swtpm and swtpm-tools",
        );
        let old = back_end.version == Some(TpmVersion::V1_2);
        let crb = old && tpm.model == Some(TpmModel::Crb);
        self.refuse_if(crb, &place.attribute("version"), "a TPM 1.2 has model='tpm-tis'; model='tpm-crb' is for 2.0");
        if let Some(banks) = &back_end.banks {
            self.refuse_if(old, &banks.at, "a TPM 1.2 has no choice of PCR banks");
            self.refuse_if(banks.names().is_empty(), &banks.at, "<active_pcr_banks> names no bank");
            let helpless = no_setup && !no_emulator;
            self.refuse_if(helpless, &banks.at, "choosing PCR banks needs swtpm_setup: install swtpm-tools");
        }
        if let Some(source) = &back_end.source {
            let dir = source.kind.unwrap_or_default() == TpmSourceKind::Dir;
            self.refuse_if(!dir, &source.at.attribute("type"), "a TPM's state is kept in a folder: use type='dir'");
            let whole = source.path.as_ref().is_some_and(|path| path.starts_with('/'));
            self.refuse_if(!whole, &source.at, "the folder of a TPM's state needs an absolute path");
        }
    }

    fn external_tpm(&mut self, tpm: &Tpm) {
        if let Some(encryption) = &tpm.backend.encryption {
            let why = "the state of an external TPM is kept by whoever runs it: encrypt it there";
            self.refuse(&encryption.at, why);
        }
        let source = tpm.backend.source.as_ref();
        let place = source.map_or(&tpm.backend.at, |source| &source.at);
        let socket = source.is_some_and(|s| s.kind == Some(TpmSourceKind::Unix) && s.path.is_some());
        let connects = source.is_none_or(|s| s.mode.is_none_or(|mode| mode == SocketMode::Connect));
        self.refuse_if(
            !socket || !connects,
            place,
            "type='external' needs <source type='unix' mode='connect' path='…'/>, the control socket of a swtpm",
        );
    }
}
