//! A diagnosis without private data: addresses and host names are replaced, the same one always by the same word.

use std::collections::HashMap;
use std::net::IpAddr;

use serde_json::Value;

use super::Diagnosis;
use crate::Result;

/// Values whose dots make them look like addresses.
const VERSIONS: &[&str] =
    &["firmware", "version", "modules", "release", "rdma_core", "libibverbs", "librdmacm"];

pub fn redacted(diagnosis: &Diagnosis) -> Result<Diagnosis> {
    let mut words = Words::default();
    if let Some(host) = diagnosis.facts.host.known() {
        words.hosts.push(host.clone());
    }
    let mut value = serde_json::to_value(diagnosis)?;
    words.replace_in(&mut value);
    Ok(serde_json::from_value(value)?)
}

#[derive(Default)]
struct Words {
    hosts: Vec<String>,
    /// The replacements so far.
    known: HashMap<String, String>,
}

impl Words {
    fn replace_in(&mut self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.replaced(text),
            Value::Array(values) => values.iter_mut().for_each(|value| self.replace_in(value)),
            Value::Object(fields) => fields
                .iter_mut()
                .filter(|(name, _)| !VERSIONS.contains(&name.as_str()))
                .for_each(|(name, value)| match value {
                    // A field of its own type, which must stay one.
                    Value::String(text) if name == "gid" => *text = self.as_address(text),
                    value => self.replace_in(value),
                }),
            _ => {}
        }
    }

    fn replaced(&mut self, text: &str) -> String {
        let (mut result, mut word) = (String::new(), String::new());
        for character in text.chars().chain(['\0']) {
            let inside =
                character.is_ascii_alphanumeric() || matches!(character, '.' | ':' | '-' | '_' | '%');
            if inside {
                word.push(character);
                continue;
            }
            result += &self.word(&std::mem::take(&mut word));
            if character != '\0' {
                result.push(character);
            }
        }
        result
    }

    /// What stands for a word: an address, perhaps with a port or a full stop, or the host's name.
    fn word(&mut self, word: &str) -> String {
        let core = word.trim_end_matches(['.', ':', '-']);
        let tail = &word[core.len()..];
        if self.hosts.iter().any(|host| host == core && !host.is_empty()) {
            return format!("host{tail}");
        }
        let bare = core.split('%').next().unwrap_or(core);
        let with_port =
            || core.rsplit_once(':').filter(|(address, _)| address.parse::<std::net::Ipv4Addr>().is_ok());
        if bare.parse::<IpAddr>().is_ok() || is_hardware(core) {
            return format!("{}{tail}", self.numbered(bare));
        }
        match with_port() {
            Some((address, port)) => format!("{}:{port}{tail}", self.numbered(address)),
            None => word.into(),
        }
    }

    fn numbered(&mut self, address: &str) -> String {
        let next = format!("address-{}", self.known.len() + 1);
        self.known.entry(address.to_lowercase()).or_insert(next).clone()
    }

    /// An address of the range for documentation, which stands for a GID; the kind of the address stays.
    fn as_address(&mut self, text: &str) -> String {
        let number = self.numbered(text).rsplit('-').next().and_then(|n| n.parse::<u16>().ok()).unwrap_or(0);
        match text.parse::<std::net::Ipv6Addr>() {
            Ok(gid) if gid.to_ipv4_mapped().is_some() => format!("::ffff:192.0.2.{}", number % 256),
            Ok(gid) if gid.is_unicast_link_local() => format!("fe80::{number:x}"),
            _ => format!("2001:db8::{number:x}"),
        }
    }
}

/// A MAC address or a GUID. A PCI address has a dot.
fn is_hardware(word: &str) -> bool {
    let parts: Vec<_> = word.split(':').collect();
    let of = |count: usize, digits: usize| {
        parts.len() == count
            && parts.iter().all(|part| part.len() == digits && part.chars().all(|c| c.is_ascii_hexdigit()))
    };
    of(6, 2) || of(8, 2) || of(4, 4) || of(20, 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_the_host_are_replaced_and_nothing_else() {
        let mut words = Words { hosts: vec!["node7".into()], ..Words::default() };
        let text = "node7: 192.0.2.1:18515 and fe80::1%eth0, 192.0.2.1. 0000:03:00.0 Linux 6.12.117 02:00:00:00:77:01 nodes node7.";
        assert_eq!(
            words.replaced(text),
            "host: address-1:18515 and address-2, address-1. 0000:03:00.0 Linux 6.12.117 address-3 nodes host."
        );
        assert_eq!(words.as_address("::ffff:192.0.2.9"), "::ffff:192.0.2.4");
        assert_eq!(words.as_address("fe80:0000:0000:0000:0011:22ff:fe33:4455"), "fe80::5");
    }
}
