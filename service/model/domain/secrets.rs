//! What in a definition is shown only to who asks for it with `secure`: passwords, cookies, what follows `?` in an address,
//! firmware blobs and OEM strings, raw arguments and variables of the hypervisor.
//!
//! A document that was shown without them is a document that can be given back: what is hidden is kept then.
//!
//! - A password, and cookies, are left out. Where they are absent at the same place they stay as they are; an empty
//!   password, or an empty `<cookies/>`, takes their place.
//! - All else is a value of an element that is shown: it reads `[hidden 3]`, the third of its kind, and means what that was.
//!   Without the element the value goes.

use super::DomainDef;
use crate::device::disk::{BackingStore, Disk};
use crate::device::display::Graphics;
use crate::device::source::{DiskSource, SourceHost};
use crate::xml::{Attribute, Element, Finding, Node, Place};
use std::collections::{HashMap, HashSet};

/// Shorter values are no secrets, and would black out every other word.
const SHORTEST: usize = 4;

/// What a value is of. It only ever means another of the same kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Blob,
    OemString,
    Argument,
    Variable,
    Query,
}

/// A value that is shown as hidden.
struct Value<'a> {
    kind: Kind,
    /// Whose it is: what it may not be moved away from.
    owner: String,
    at: Place,
    text: &'a mut String,
}

/// Numbers for secrets: the same for the same, over several definitions.
#[derive(Debug, Default)]
pub(super) struct Numbers(HashMap<String, usize>);

impl Numbers {
    /// Puts its number in place of a secret. An empty one is none.
    fn hide(&mut self, secret: &mut String) {
        if !secret.is_empty() {
            let next = self.0.len() + 1;
            let number = *self.0.entry(std::mem::take(secret)).or_insert(next);
            *secret = format!("[hidden, {number}]");
        }
    }

    /// The same for what is only kept; in `cookies` for all that is said.
    fn hide_in_tree(&mut self, element: &mut Element, cookies: bool) {
        let cookies = cookies || element.name == "cookies";
        let secret = |attribute: &&mut Attribute| cookies || attribute.name == "query";
        element.attributes.iter_mut().filter(secret).for_each(|attribute| self.hide(&mut attribute.value));
        for node in &mut element.nodes {
            match node {
                Node::Element(child) => self.hide_in_tree(child, cookies),
                Node::Text(text) if cookies => self.hide(text),
                _ => {}
            }
        }
    }
}

impl DomainDef {
    /// Puts numbers in the places of all that is secret.
    pub(super) fn number_secrets(&mut self, numbers: &mut Numbers) {
        for display in &mut self.devices.graphics {
            display.passwd.iter_mut().chain(&mut display.passwd_valid_to).for_each(|secret| numbers.hide(secret));
        }
        self.each_source(|source| {
            for cookie in source.cookies.iter_mut().flat_map(|cookies| &mut cookies.cookies) {
                cookie.value.iter_mut().chain([&mut cookie.name]).for_each(|secret| numbers.hide(secret));
            }
        });
        self.values().into_iter().for_each(|value| numbers.hide(value.text));
        for disk in &mut self.devices.disks {
            disk.rest.elements.iter_mut().for_each(|element| numbers.hide_in_tree(element, false));
        }
    }

    /// Takes out, or writes as hidden, all that is secret.
    pub(super) fn hide_secrets(&mut self) {
        self.devices.graphics.iter_mut().for_each(forget_password);
        self.each_source(|source| source.cookies = None);
        let mut numbers: HashMap<Kind, usize> = HashMap::new();
        for value in self.values() {
            let number = numbers.entry(value.kind).or_insert(0);
            *number += 1;
            if !value.text.is_empty() {
                *value.text = format!("[hidden {number}]");
            }
        }
        for disk in &mut self.devices.disks {
            disk.rest.elements.iter_mut().for_each(forget_in_tree);
        }
    }

    /// Puts back what this definition, given by somebody who was not shown all of `known`, means to keep of it. The first
    /// of `known` that has something is what counts. Errors: values that are hidden and cannot be told.
    pub fn keep_hidden(&mut self, known: &[&DomainDef]) -> Result<(), Vec<Finding>> {
        for before in known {
            keep_passwords(&mut self.devices.graphics, &before.devices.graphics);
            for disk in &mut self.devices.disks {
                let same = |other: &&Disk| other.target.dev == disk.target.dev;
                if let Some(before) = before.devices.disks.iter().find(same) {
                    keep_cookies(disk, before);
                }
            }
        }
        let mut copies: Vec<DomainDef> = known.iter().copied().cloned().collect();
        let known: Vec<Vec<Value>> = copies.iter_mut().map(DomainDef::values).collect();
        let mut log = Vec::new();
        for value in self.values() {
            let Some(number) = hidden(value.text) else { continue };
            let nth = |values: &Vec<Value>| {
                let found = values.iter().filter(|other| other.kind == value.kind).nth(number.checked_sub(1)?)?;
                (found.owner == value.owner).then(|| found.text.clone())
            };
            let meant: HashSet<String> = known.iter().filter_map(nth).collect();
            let mut meant = meant.into_iter();
            match (meant.next(), meant.next()) {
                (Some(one), None) => *value.text = one,
                (Some(_), Some(_)) => {
                    let why = "is one value in what runs and another in what is stored: give the one that is meant";
                    log.push(Finding::invalid(&value.at, format!("'{}' {why}", value.text)));
                }
                (None, _) => {
                    let why = "stands for a value that was not shown, and there is none here: give the value itself";
                    log.push(Finding::invalid(&value.at, format!("'{}' {why}", value.text)));
                }
            }
        }
        if log.is_empty() { Ok(()) } else { Err(log) }
    }

    /// A text in which everything that is secret here is blacked out, as it is or as it stands in a command line.
    pub fn black_out(&self, text: &str) -> String {
        let mut def = self.clone();
        let mut secrets: Vec<String> = def.devices.graphics.iter().filter_map(|g| g.passwd.clone()).collect();
        def.each_source(|source| {
            let cookies = source.cookies.iter().flat_map(|cookies| &cookies.cookies);
            secrets.extend(cookies.filter_map(|cookie| cookie.value.clone()));
        });
        secrets.extend(def.values().into_iter().map(|value| value.text.clone()));
        secrets.retain(|secret| secret.len() >= SHORTEST);
        // The longest first: one may be part of another.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        let mut text = text.to_owned();
        for secret in secrets {
            let json = quoted(&secret);
            for form in [secret.replace(',', ",,"), json, secret.replace('\'', "'\\''"), secret] {
                text = text.replace(&form, "[hidden]");
            }
        }
        text
    }

    /// All values that are shown as hidden, in an order that only depends on the document.
    fn values(&mut self) -> Vec<Value<'_>> {
        let mut values = Vec::new();
        for sysinfo in &mut self.sysinfos {
            let blobs = sysinfo.entries.iter_mut().map(|entry| (Kind::Blob, entry));
            let strings = sysinfo.oem_strings.iter_mut().flat_map(|strings| &mut strings.entries);
            for (kind, entry) in blobs.chain(strings.map(|entry| (Kind::OemString, entry))) {
                let (owner, at) = (entry.name.clone().unwrap_or_default(), entry.at.clone());
                values.extend(entry.value.as_mut().map(|text| Value { kind, owner, at, text }));
            }
        }
        if let Some(native) = &mut self.native {
            values.extend(native.arguments.iter_mut().map(|argument| Value {
                kind: Kind::Argument,
                owner: String::new(),
                at: argument.at.clone(),
                text: &mut argument.value,
            }));
            for variable in &mut native.environment {
                let (kind, owner, at) = (Kind::Variable, variable.name.clone(), variable.at.clone());
                values.extend(variable.value.as_mut().map(|text| Value { kind, owner, at, text }));
            }
        }
        for source in self.devices.disks.iter_mut().flat_map(sources) {
            let (kind, owner, at) = (Kind::Query, server(source), source.at.clone());
            values.extend(source.query.as_mut().map(|text| Value { kind, owner, at, text }));
        }
        values
    }

    fn each_source(&mut self, act: impl FnMut(&mut DiskSource)) {
        self.devices.disks.iter_mut().flat_map(sources).for_each(act);
    }
}

/// The number of a hidden value.
fn hidden(text: &str) -> Option<usize> {
    text.strip_prefix("[hidden ")?.strip_suffix(']')?.parse().ok()
}

/// The sources of a disk, from the top of its chain down.
fn sources(disk: &mut Disk) -> Vec<&mut DiskSource> {
    let mut found: Vec<&mut DiskSource> = disk.source.iter_mut().collect();
    let mut layer: Option<&mut BackingStore> = disk.backing.as_deref_mut();
    while let Some(store) = layer {
        found.extend(store.source.as_mut());
        layer = store.backing.as_deref_mut();
    }
    found
}

/// What is asked of which server: a secret is for that alone.
fn server(source: &DiskSource) -> String {
    let host = |host: &SourceHost| format!("{:?} {:?} {:?}", host.name, host.transport, host.socket);
    let hosts: Vec<String> = source.hosts.iter().map(host).collect();
    format!("{:?} {:?} {hosts:?}", source.protocol, source.name)
}

fn forget_password(graphics: &mut Graphics) {
    // An empty one is none: it says that nobody gets in, and nothing is secret about that.
    if graphics.passwd.as_ref().is_some_and(|password| !password.is_empty()) {
        graphics.passwd = None;
        graphics.passwd_valid_to = None;
    }
}

/// The same for what is only kept.
fn forget_in_tree(element: &mut Element) {
    element.take_attr("query");
    element.take_children("cookies");
    element.elements_mut().for_each(forget_in_tree);
}

/// Each display keeps the password of the one of its kind and number.
fn keep_passwords(displays: &mut [Graphics], before: &[Graphics]) {
    let mut numbers = HashMap::new();
    for display in displays {
        let number = numbers.entry(display.kind).or_insert(0);
        let same = before.iter().filter(|other| other.kind == display.kind).nth(*number);
        *number += 1;
        let Some(before) = same.filter(|before| before.passwd.as_ref().is_some_and(|p| !p.is_empty())) else {
            continue;
        };
        if display.passwd.is_none() {
            display.passwd.clone_from(&before.passwd);
            if display.passwd_valid_to.is_none() {
                display.passwd_valid_to.clone_from(&before.passwd_valid_to);
            }
        }
    }
}

/// Each layer keeps the cookies for the same server.
fn keep_cookies(disk: &mut Disk, before: &Disk) {
    let mut before = before.clone();
    let before = sources(&mut before);
    for source in sources(disk) {
        let same = before.iter().find(|other| server(other) == server(source));
        if let (None, Some(same)) = (&source.cookies, same) {
            source.cookies.clone_from(&same.cookies);
        }
    }
}

/// A text as it stands between the quotes of a JSON string.
fn quoted(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"")
}
