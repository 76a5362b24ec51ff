//! Whether a guest would notice if its machine became another one: two documents, read, completed, compared.

use crate::Service;
use crate::authz::{Caller, Subject};
use crate::error::{Error, Result};
use crate::verb;
use virt_model::domain::DomainDef;
use virt_model::domain::abi::{AbiDifference, Strictness, read_pair};
use virt_model::driver::DriverError;
use virt_model::xml::{Finding, FindingKind};

impl Service {
    /// Every difference that a running guest of `source` would notice in `target`; none: they are compatible. Whether this
    /// host could run them does not matter. Changes nothing.
    /// Errors: `ConfigInvalid` says which of the two is not a valid document.
    pub async fn compare(&self, caller: &Caller, source: &str, target: &str) -> Result<Vec<AbiDifference>> {
        self.allow(caller, &verb::COMPARE, &Subject::default()).await?;
        let seat = self.shared.desk.seat(caller.uid, &[source, target]).await;
        let (one, other) = (source.to_owned(), target.to_owned());
        let read = seat.work(move || read_pair(&one, &other)).await;
        let (source, target) = read.map_err(|(side, findings)| invalid(side.as_str(), findings))?;
        let completed = (self.completed("source", &source).await?, self.completed("target", &target).await?);
        // What a driver decides is compared only where it has decided for both.
        let (source, target) = match completed {
            (Some(source), Some(target)) => (source, target),
            _ => (with_defaults(source), with_defaults(target)),
        };
        Ok(source.compare_abi(&target, Strictness::Running))
    }

    /// As the driver for its type completes it; `None` if there is none, or it cannot on this host.
    pub(crate) async fn completed(&self, side: &str, def: &DomainDef) -> Result<Option<DomainDef>> {
        let Some(driver) = self.shared.driver_for(&def.kind) else { return Ok(None) };
        let mut completed = def.clone();
        match driver.complete(&mut completed).await {
            Ok(()) => Ok(Some(with_defaults(completed))),
            Err(DriverError::Config(findings)) if findings.iter().all(|f| f.kind == FindingKind::Invalid) => {
                Err(invalid(side, findings))
            }
            Err(error) => {
                tracing::debug!(side, name = def.name, %error, "compared without its driver");
                Ok(None)
            }
        }
    }
}

fn with_defaults(mut def: DomainDef) -> DomainDef {
    def.fill_defaults();
    def
}

/// The findings, each saying in which document it is.
fn invalid(side: &str, mut findings: Vec<Finding>) -> Error {
    findings.iter_mut().for_each(|finding| finding.message = format!("in the {side} document: {}", finding.message));
    Error::ConfigInvalid(findings)
}
