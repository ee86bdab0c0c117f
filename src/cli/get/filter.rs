//! Which rows are shown.

use std::net::IpAddr;
use std::str::FromStr;

use super::record::Record;
use crate::cli::snapshot::PortName;

/// `--service`: NAMESPACE/NAME, with or without :PORT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceFilter {
    namespace: String,
    name: String,
    port: Option<String>,
}

impl FromStr for ServiceFilter {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const ALLOWED: &str = "expected NAMESPACE/NAME, with or without :PORT";
        let (namespace, rest) = text.split_once('/').ok_or(ALLOWED)?;
        let (name, port) = rest.split_once(':').map_or((rest, None), |(name, port)| (name, Some(port.to_owned())));
        if namespace.is_empty() || name.is_empty() || name.contains('/') {
            return Err(ALLOWED);
        }
        Ok(ServiceFilter { namespace: namespace.to_owned(), name: name.to_owned(), port })
    }
}

impl ServiceFilter {
    pub fn is(&self, service: &PortName) -> bool {
        service.namespace == self.namespace
            && service.name == self.name
            && self.port.as_ref().is_none_or(|port| *port == service.port_name)
    }
}

/// All that is asked of a row.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub namespace: Option<String>,
    /// Of Services, by name alone.
    pub name: Option<String>,
    pub service: Option<ServiceFilter>,
    pub address: Option<IpAddr>,
    pub state: Option<String>,
}

impl Filter {
    pub fn takes(&self, record: &dyn Record) -> bool {
        let of = record.service();
        self.namespace.as_ref().is_none_or(|wanted| of.is_some_and(|of| of.namespace == *wanted))
            && self.name.as_ref().is_none_or(|wanted| of.is_some_and(|of| of.name == *wanted))
            && self.service.as_ref().is_none_or(|wanted| of.is_some_and(|of| wanted.is(of)))
            && self.address.is_none_or(|wanted| record.addresses().contains(&wanted))
            && self.state.as_ref().is_none_or(|wanted| record.state().eq_ignore_ascii_case(wanted))
    }
}
