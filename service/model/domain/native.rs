//! Elements of namespaces other than the format's own: raw hypervisor arguments (`<qemu:commandline>`) and the like.

use super::part::element;
use super::value::complain;
use crate::xml::{Element, Finding};

/// Namespaces, each with its prefix.
pub(crate) type Namespaces = &'static [(&'static str, &'static str)];

/// The namespaces whose elements are part of the format, by the prefix under which they are written.
pub(super) const NAMESPACES: Namespaces = &[
    ("qemu", "http://libvirt.org/schemas/domain/qemu/1.0"),
    ("lxc", "http://libvirt.org/schemas/domain/lxc/1.0"),
    ("xen", "http://libvirt.org/schemas/domain/xen/1.0"),
    ("bhyve", "http://libvirt.org/schemas/domain/bhyve/1.0"),
    ("vmware", "http://libvirt.org/schemas/domain/vmware/1.0"),
];

element! {
    /// `<qemu:commandline>`
    pub struct NativeArguments {
        /// Appended to the command line, in order.
        children "qemu:arg" => arguments: Vec<NativeArgument>,
        /// Set in the hypervisor's environment.
        children "qemu:env" => environment: Vec<NativeVariable>,
    }
}

element! {
    /// `<qemu:arg>`
    pub struct NativeArgument {
        /// One argument.
        need "value" => value: String,
    }
}

element! {
    /// `<qemu:env>`
    pub struct NativeVariable {
        /// Its name.
        need "name" => name: String,
        /// Its value; empty if absent.
        attr "value" => value: Option<String>,
    }
}

/// Gives elements of known namespaces the prefix under which they are written; elements of other namespaces are reported
/// and taken out.
pub(crate) fn canonical_prefixes(root: &mut Element, namespaces: Namespaces, log: &mut Vec<Finding>) {
    if let Some(uri) = &root.namespace {
        complain(log, &root.at, format!("<{}> is in the namespace '{uri}'; it must be in none", root.name));
    }
    for (prefix, uri) in namespaces {
        let declared = root.attributes.iter().find(|a| a.name == format!("xmlns:{prefix}") && a.value != *uri);
        if let Some(attribute) = declared {
            complain(log, &attribute.place(), format!("the prefix '{prefix}' can only stand for '{uri}'"));
        }
    }
    rename(root, namespaces, log);
}

fn rename(element: &mut Element, namespaces: Namespaces, log: &mut Vec<Finding>) {
    let mut foreign = Vec::new();
    for child in element.elements_mut().filter(|child| child.name != "metadata") {
        if let Some(uri) = child.namespace.clone() {
            match namespaces.iter().find(|(_, known)| *known == &*uri) {
                Some((prefix, _)) => {
                    child.name = format!("{prefix}:{}", child.local_name());
                    child.attributes.retain(|a| !(a.name.starts_with("xmlns") && a.value == *uri));
                }
                None => {
                    let message =
                        format!("<{}> is in the namespace '{uri}', which only <metadata> may hold", child.name);
                    complain(log, &child.at, message);
                    foreign.push(child.name.clone());
                }
            }
        }
        rename(child, namespaces, log);
    }
    for name in foreign {
        element.take_child(&name);
    }
}

/// Declares, at the root, the prefixes that its children use.
pub(crate) fn declare_prefixes(root: &mut Element, namespaces: Namespaces) {
    for (prefix, uri) in namespaces {
        if root.elements().any(|child| child.name.split_once(':').is_some_and(|(used, _)| used == *prefix)) {
            root.set_attr(&format!("xmlns:{prefix}"), *uri);
        }
    }
}
