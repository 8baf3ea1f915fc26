//! A grade that a person understands at a glance.

use serde::{Deserialize, Serialize};

use super::trials::{Pair, Trials};

/// How much works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Grade {
    /// Every device moves the dma-bufs of every exporter.
    A,
    /// Some pairs of device and exporter do.
    B,
    /// RDMA moves host memory, or the pages behind a udmabuf, but no device imports a dma-buf.
    C,
    /// A device opens, and nothing moves.
    D,
    /// No device can be opened.
    F,
    /// Nothing was tried.
    #[serde(rename = "none")]
    Ungraded,
}

impl Grade {
    pub fn of(trials: Option<&Trials>) -> Self {
        let Some(trials) = trials else { return Self::Ungraded };
        let dmabufs = || trials.pairs.iter().filter(|pair| pair.dmabuf);
        let all_devices = trials.devices.iter().all(|device| device.opened);
        if !trials.devices.iter().any(|device| device.opened) {
            Self::F
        } else if all_devices && dmabufs().next().is_some() && dmabufs().all(Pair::imports) {
            Self::A
        } else if dmabufs().any(Pair::imports) {
            Self::B
        } else if trials.pairs.iter().any(Pair::works) {
            Self::C
        } else {
            Self::D
        }
    }

    /// Whether verified bytes moved.
    pub fn works(self) -> bool {
        matches!(self, Self::A | Self::B | Self::C)
    }

    pub fn summary(self, trials: Option<&Trials>) -> String {
        let pairs = || trials.map(|trials| trials.pairs.as_slice()).unwrap_or_default().iter();
        let dmabufs = pairs().filter(|pair| pair.dmabuf).count();
        let imported = pairs().filter(|pair| pair.imports()).count();
        match self {
            Self::A => format!(
                "every device moves the dma-bufs of every exporter: {imported} of {dmabufs} pairs, verified"
            ),
            Self::B => {
                format!("some dma-bufs move: {imported} of {dmabufs} pairs of exporter and device, verified")
            }
            Self::C => "RDMA moves host memory, but no device imports a dma-buf".into(),
            Self::D => "a device opens, but no bytes move".into(),
            Self::F => "no RDMA device can be opened".into(),
            Self::Ungraded => "a copy of another machine's files: nothing was tried".into(),
        }
    }
}
