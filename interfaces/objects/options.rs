//! Options that verbs of several objects have.

use super::job::no_wait;
use crate::bus::call::Options;
use crate::error::Error;
use std::time::Duration;
use virt_model::xml::shorten;
use virt_service::Affect;

/// The longest that a caller may have virtd wait for a guest to let go of a device: the domain has one change at a time.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// How long a guest may take, if the caller says so.
pub fn patience(options: &mut Options) -> Result<Option<Duration>, Error> {
    let patience = options.long("timeout-usec")?.map(Duration::from_micros);
    if patience > Some(LONGEST_WAIT) {
        let most = LONGEST_WAIT.as_micros();
        return Err(Error::argument(format!("option 'timeout-usec' is at most {most}")));
    }
    Ok(patience)
}

/// Which of a machine's configurations are meant: the last options.
pub fn affect(mut options: Options) -> Result<Affect, Error> {
    let affect = Affect { live: options.flag("live")?, config: options.flag("config")? };
    options.end()?;
    Ok(affect)
}

/// The options of a job that has no others: whether it is cancelled when its caller leaves, and whether not to wait.
pub fn job_options(mut options: Options) -> Result<(bool, bool), Error> {
    let departs = options.flag("cancel-on-disconnect")?;
    Ok((departs, no_wait(options)?))
}

/// An option that is one of few words; the first, if it is not given.
pub fn choice<T: Copy + std::fmt::Display + Default>(
    options: &mut Options,
    key: &'static str,
    all: &[T],
) -> Result<T, Error> {
    let Some(word) = options.text(key)? else { return Ok(T::default()) };
    all.iter().copied().find(|one| one.to_string() == word).ok_or_else(|| {
        let words: Vec<String> = all.iter().map(ToString::to_string).collect();
        Error::argument(format!("option '{key}' is one of {}, not '{}'", words.join(", "), shorten(&word)))
    })
}
