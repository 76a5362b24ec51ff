//! What a client sets and reads of a machine by typed keys, instead of in a document: a table for each verb, which says under which
//! key a value stands where in the definition, and in which unit. Whether a value may be so is for the checks of definitions.

use crate::device::disk::Iotune;
use crate::device::interface::{Bandwidth, Rate};
use crate::domain::size::Kib;
use crate::domain::tune::{Cputune, Memtune};
use std::collections::BTreeMap;

/// A value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SettingValue {
    /// A number from 0 on.
    Number(u64),
    /// One that may be negative.
    Signed(i64),
    /// A word.
    Text(String),
}

/// Of which kind a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SettingKind {
    /// [`SettingValue::Number`]
    Number,
    /// [`SettingValue::Signed`]
    Signed,
    /// [`SettingValue::Text`]
    Text,
}

/// Values by their keys.
pub type Settings = BTreeMap<&'static str, SettingValue>;

/// A row: a key of a part of the definition.
pub struct Setting<T: 'static> {
    /// The key.
    pub key: &'static str,
    /// Of which kind its values are.
    pub kind: SettingKind,
    get: fn(&T) -> Option<SettingValue>,
    /// Error: what values it takes.
    set: fn(&mut T, &SettingValue) -> Result<(), &'static str>,
}

impl SettingValue {
    fn number(&self) -> u64 {
        if let SettingValue::Number(number) = self { *number } else { 0 }
    }

    fn signed(&self) -> i64 {
        if let SettingValue::Signed(number) = self { *number } else { 0 }
    }

    fn text(&self) -> &str {
        if let SettingValue::Text(text) = self { text } else { "" }
    }
}

/// The values that are set: what is not limited is left out.
pub fn read<T>(table: &[Setting<T>], of: &T) -> Settings {
    let value = |row: &Setting<T>| Some((row.key, (row.get)(of).filter(|value| *value != SettingValue::Number(0))?));
    table.iter().filter_map(value).collect()
}

/// Sets those that are given: 0 and an empty text take a value away, and what is not given stays.
/// Error: a sentence about one that cannot be.
pub fn apply<T>(table: &[Setting<T>], to: &mut T, given: &Settings) -> Result<(), String> {
    for row in table {
        if let Some(value) = given.get(row.key) {
            (row.set)(to, value).map_err(|takes| format!("'{}' takes {takes}", row.key))?;
        }
    }
    Ok(())
}

/// The keys of a table, with the kinds of their values.
pub fn keys<T>(table: &'static [Setting<T>]) -> Vec<(&'static str, SettingKind)> {
    table.iter().map(|row| (row.key, row.kind)).collect()
}

/// Rows of values that stand in a field each, in these ways:
/// `number`: as it is; `signed`: as it is; `bytes`: kept in KiB; `text`: a word; `limit`: as it is, but that 0 stays where something
/// was, as who runs has a place for it; `usec`: kept in seconds.
macro_rules! settings {
    ($($key:literal $way:ident $field:ident;)*) => { &[$(settings!(@row $key $way $field),)*] };
    (@row $key:literal number $field:ident) => { Setting {
        key: $key,
        kind: SettingKind::Number,
        get: |of| of.$field.map(SettingValue::Number),
        set: |to, value| { to.$field = Some(value.number()).filter(|n| *n > 0); Ok(()) },
    } };
    (@row $key:literal signed $field:ident) => { Setting {
        key: $key,
        kind: SettingKind::Signed,
        get: |of| of.$field.map(SettingValue::Signed),
        set: |to, value| { to.$field = Some(value.signed()).filter(|n| *n != 0); Ok(()) },
    } };
    (@row $key:literal bytes $field:ident) => { Setting {
        key: $key,
        kind: SettingKind::Number,
        get: |of| of.$field.map(|kib| SettingValue::Number(kib.0.saturating_mul(1024))),
        set: |to, value| { to.$field = Some(Kib(value.number().div_ceil(1024))).filter(|kib| kib.0 > 0); Ok(()) },
    } };
    (@row $key:literal limit $field:ident) => { Setting {
        key: $key,
        kind: SettingKind::Number,
        get: |of| of.$field.map(SettingValue::Number),
        set: |to, value| { to.$field = Some(value.number()).filter(|n| *n > 0 || to.$field.is_some()); Ok(()) },
    } };
    (@row $key:literal usec $field:ident) => { Setting {
        key: $key,
        kind: SettingKind::Number,
        get: |of| of.$field.map(|seconds| SettingValue::Number(seconds.saturating_mul(SECOND))),
        set: |to, value| {
            let usec = value.number();
            to.$field = Some(usec / SECOND).filter(|n| *n > 0);
            if usec.is_multiple_of(SECOND) { Ok(()) } else { Err("whole seconds, in microseconds") }
        },
    } };
    (@row $key:literal text $field:ident) => { Setting {
        key: $key,
        kind: SettingKind::Text,
        get: |of| of.$field.clone().map(SettingValue::Text),
        set: |to, value| { to.$field = Some(value.text().to_owned()).filter(|text| !text.is_empty()); Ok(()) },
    } };
}

/// Microseconds.
const SECOND: u64 = 1_000_000;

/// CPU time: `SetSchedulerParameters`.
pub const SCHEDULER: &[Setting<Cputune>] = settings! {
    "cpu-shares" number shares;
    "vcpu-period-usec" number period_us;
    "vcpu-quota-usec" signed quota_us;
    "global-period-usec" number global_period_us;
    "global-quota-usec" signed global_quota_us;
    "emulator-period-usec" number emulator_period_us;
    "emulator-quota-usec" signed emulator_quota_us;
    "iothread-period-usec" number iothread_period_us;
    "iothread-quota-usec" signed iothread_quota_us;
};

/// Memory of the host: `SetMemoryParameters`.
pub const MEMORY: &[Setting<Memtune>] = settings! {
    "hard-limit" bytes hard;
    "soft-limit" bytes soft;
    "swap-hard-limit" bytes swap_hard;
};

/// Requests of a disk: `SetBlockThrottle`.
pub const THROTTLE: &[Setting<Iotune>] = settings! {
    "total-bytes-per-second" limit bytes;
    "read-bytes-per-second" limit bytes_read;
    "write-bytes-per-second" limit bytes_written;
    "total-requests-per-second" limit ops;
    "read-requests-per-second" limit ops_read;
    "write-requests-per-second" limit ops_written;
    "total-bytes-per-second-maximum" limit bytes_max;
    "read-bytes-per-second-maximum" limit bytes_read_max;
    "write-bytes-per-second-maximum" limit bytes_written_max;
    "total-requests-per-second-maximum" limit ops_max;
    "read-requests-per-second-maximum" limit ops_read_max;
    "write-requests-per-second-maximum" limit ops_written_max;
    "total-bytes-per-second-maximum-usec" usec bytes_max_s;
    "read-bytes-per-second-maximum-usec" usec bytes_read_max_s;
    "write-bytes-per-second-maximum-usec" usec bytes_written_max_s;
    "total-requests-per-second-maximum-usec" usec ops_max_s;
    "read-requests-per-second-maximum-usec" usec ops_read_max_s;
    "write-requests-per-second-maximum-usec" usec ops_written_max_s;
    "request-size" limit ops_size;
    "group" text group;
};

/// A row of one direction; without an average there is no limit, so that what else is said of it goes, too.
macro_rules! rate {
    ($key:literal $direction:ident $field:ident) => {
        Setting {
            key: $key,
            kind: SettingKind::Number,
            get: |of| of.$direction.as_ref()?.$field.map(SettingValue::Number),
            set: |to, value| {
                to.$direction.get_or_insert_default().$field = Some(value.number()).filter(|n| *n > 0);
                if to.$direction.as_ref().is_some_and(is_empty) {
                    to.$direction = None;
                }
                Ok(())
            },
        }
    };
}

/// A row of a guarantee, which is a network's to give.
macro_rules! floor {
    ($key:literal) => {
        Setting {
            key: $key,
            kind: SettingKind::Number,
            get: |_| None,
            set: |_, value| match value.number() {
                0 => Ok(()),
                _ => Err("0 alone: a guarantee is given by a virtual network, and there are none yet"),
            },
        }
    };
}

/// What passes a network card: `SetInterfaceBandwidth`. In the units of the definition.
pub const BANDWIDTH: &[Setting<Bandwidth>] = &[
    rate!("inbound-average" inbound average),
    rate!("inbound-peak" inbound peak),
    rate!("inbound-burst" inbound burst),
    floor!("inbound-floor"),
    rate!("outbound-average" outbound average),
    rate!("outbound-peak" outbound peak),
    rate!("outbound-burst" outbound burst),
];

fn is_empty(rate: &Rate) -> bool {
    (rate.average, rate.peak, rate.burst) == (None, None, None) && rate.rest.is_empty()
}

/// Sets what passes a card. Whoever lifts an average lifts what else is said of that direction.
pub fn apply_bandwidth(to: &mut Bandwidth, given: &Settings) -> Result<(), String> {
    apply(BANDWIDTH, to, given)?;
    let lifted = |key: &str| given.get(key) == Some(&SettingValue::Number(0));
    if lifted("inbound-average") {
        to.inbound = None;
    }
    if lifted("outbound-average") {
        to.outbound = None;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use SettingValue::{Number, Signed, Text};

    #[test]
    fn what_is_set_is_read_again_and_what_is_not_given_stays() {
        let mut tune = Iotune::default();
        let given = Settings::from([
            ("read-bytes-per-second", Number(4096)),
            ("read-bytes-per-second-maximum", Number(8192)),
            ("read-bytes-per-second-maximum-usec", Number(3_000_000)),
            ("group", Text("slow".to_owned())),
        ]);
        apply(THROTTLE, &mut tune, &given).expect("all can be");
        assert_eq!(
            (tune.bytes_read, tune.bytes_read_max_s, tune.group.as_deref()),
            (Some(4096), Some(3), Some("slow"))
        );
        apply(THROTTLE, &mut tune, &Settings::from([("write-requests-per-second", Number(9))])).expect("one more");
        assert_eq!(read(THROTTLE, &tune).len(), 5);
        let odd = Settings::from([("read-bytes-per-second-maximum-usec", Number(1_500_000))]);
        assert!(apply(THROTTLE, &mut tune, &odd).expect_err("half a second").contains("whole seconds"));
        apply(THROTTLE, &mut tune, &Settings::from([("write-requests-per-second", Number(0))])).expect("lifted");
        assert_eq!(
            (tune.ops_written, read(THROTTLE, &tune).contains_key("write-requests-per-second")),
            (Some(0), false)
        );
        apply(THROTTLE, &mut tune, &Settings::from([("total-bytes-per-second", Number(0))])).expect("nothing to lift");
        assert_eq!(tune.bytes, None);

        let (mut cpu, mut memory) = (Cputune::default(), Memtune::default());
        let given = Settings::from([("cpu-shares", Number(512)), ("vcpu-quota-usec", Signed(-1))]);
        apply(SCHEDULER, &mut cpu, &given).expect("both");
        assert_eq!((read(SCHEDULER, &cpu), cpu.quota_us), (given, Some(-1)));
        apply(MEMORY, &mut memory, &Settings::from([("hard-limit", Number(1_000_000))])).expect("in bytes");
        assert_eq!(read(MEMORY, &memory), Settings::from([("hard-limit", Number(977 * 1024))]));
    }

    #[test]
    fn a_direction_without_an_average_is_not_limited() {
        let mut limits = Bandwidth::default();
        let given = Settings::from([("inbound-average", Number(1000)), ("inbound-burst", Number(64))]);
        apply_bandwidth(&mut limits, &given).expect("both");
        assert_eq!(read(BANDWIDTH, &limits), given);
        apply_bandwidth(&mut limits, &Settings::from([("inbound-average", Number(0))])).expect("lifted");
        assert_eq!((limits.inbound.as_ref(), limits.outbound.as_ref()), (None, None));
        apply_bandwidth(&mut limits, &Settings::from([("inbound-floor", Number(0))])).expect("none is none");
        let floor = Settings::from([("inbound-floor", Number(1))]);
        assert!(apply_bandwidth(&mut limits, &floor).expect_err("no network").contains("virtual network"));
    }
}
