//! What in a document contradicts itself, or can be on no machine: each rule once, most of them as a row of a table.
//!
//! | file | what it holds |
//! |---|---|
//! | `values` | numbers and words that one place can have |
//! | `pairs` | what does not stand beside what, and what needs what |
//! | `once` | what is there no second time under one name |
//! | `seats` | which kind of address a device can have |
//! | `sets` | lists that overlap, leave gaps, or name what is not there |
//! | `places` | controllers, their companions, ports, hubs, functions |
//! | `counts` | of which a machine has one |
//! | `limits` | numbers that another number bounds |
//!
//! A finding names the place and says what to do. What no machine can be is `Invalid`, and is not defined; what other
//! tools define, too, and cannot start is `Unsupported`; what starts and has no effect is a `Warning`. What was stored once is read without asking here again, and is
//! held to these rules when it is validated or started.

mod counts;
mod limits;
mod once;
mod pairs;
mod places;
mod rows;
mod seats;
mod sets;
mod table;
mod values;

use super::DomainDef;
use super::part::Part;
use crate::xml::{Finding, Place};

type Log = Vec<Finding>;

/// Finds all of it, in no order.
pub(super) fn check(def: &DomainDef, log: &mut Log) {
    table::hold(&Part::write(def, "domain"), log);
    sets::check(def, log);
    places::check(def, log);
    counts::check(def, log);
    limits::check(def, log);
}

fn never_if(condition: bool, at: &Place, message: &str, log: &mut Log) {
    if condition {
        log.push(Finding::invalid(at, message));
    }
}
