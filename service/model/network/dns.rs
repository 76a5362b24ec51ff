//! `<dns>` and `<domain>`: names that guests find each other and the world by.

use crate::domain::part::element;
use std::net::IpAddr;

element! {
    /// `<domain>`
    pub struct DnsDomain {
        /// Its name.
        need "name" => name: String,
        /// Its names are answered for here alone, and not asked for elsewhere.
        yes_no "localOnly" => local_only: Option<bool>,
        /// The host's own resolver is told of it.
        yes_no "register" => register: Option<bool>,
    }
}

element! {
    /// `<dns>`
    pub struct Dns {
        /// Whether names are answered for at all.
        yes_no "enable" => enable: Option<bool>,
        /// Names without a dot are asked for elsewhere, too.
        yes_no "forwardPlainNames" => forward_plain_names: Option<bool>,
        /// `<forwarder>`
        children "forwarder" => forwarders: Vec<Forwarder>,
        /// `<txt>`
        children "txt" => txts: Vec<Txt>,
        /// `<srv>`
        children "srv" => srvs: Vec<Srv>,
        /// `<host>`
        children "host" => hosts: Vec<DnsHost>,
    }
}

element! {
    /// `<forwarder>`: who is asked for what is not known here.
    pub struct Forwarder {
        /// For names in it alone.
        attr "domain" => domain: Option<String>,
        /// Who; nobody if absent, and whoever the host asks.
        attr "addr" => addr: Option<IpAddr>,
        /// At which port.
        attr "port" => port: Option<u16>,
    }
}

element! {
    /// `<txt>`
    pub struct Txt {
        /// Of which name.
        need "name" => name: String,
        /// Its text.
        attr "value" => value: Option<String>,
    }
}

element! {
    /// `<srv>`: who does a service.
    pub struct Srv {
        /// The service.
        need "service" => service: String,
        /// How it is reached.
        need "protocol" => protocol: String,
        /// For which domain.
        attr "domain" => domain: Option<String>,
        /// Who; nobody if absent.
        attr "target" => target: Option<String>,
        /// At which port.
        attr "port" => port: Option<u16>,
        /// The less, the sooner.
        attr "priority" => priority: Option<u16>,
        /// The more, the oftener.
        attr "weight" => weight: Option<u16>,
    }
}

element! {
    /// `<dns><host>`
    pub struct DnsHost {
        /// Its address.
        attr "ip" => ip: Option<IpAddr>,
        /// `<hostname>`
        leaves "hostname" => names: Vec<String>,
    }
}
