//! `<qemu:commandline>`: raw hypervisor arguments.

use super::part::element;

/// The namespace of QEMU's own elements.
pub const QEMU_NAMESPACE: &str = "http://libvirt.org/schemas/domain/qemu/1.0";

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
