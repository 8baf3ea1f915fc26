//! The options of a queue pair that the packets on the fabric carry: checked before anything is created.
//!
//! `unsafe` is here to read the P_Key table and libibverbs' table of rates.

use std::fmt::Display;

use ibverbs_sys as ffi;

use super::error::{Error, Result};
use super::{Context, Port, QueuePairOptions, check};

/// Codes of `enum ibv_rate`. Later ones are not known.
const RATES: std::ops::RangeInclusive<ffi::ibv_rate> = 2..=22;

/// The checked options: `None` leaves the choice to the route, or to the default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Fabric {
    pub pkey_index: Option<u16>,
    service_level: Option<u8>,
    traffic_class: Option<u8>,
    flow_label: Option<u32>,
    hop_limit: Option<u8>,
    /// Of `enum ibv_rate`.
    static_rate: Option<u8>,
}

impl Fabric {
    /// Checks the options of a queue pair on a port.
    pub(super) fn check(context: &Context, port: &Port, options: &QueuePairOptions) -> Result<Self> {
        let device = context.device_name();
        in_range(device, "timeout", options.timeout, 0, 31)?;
        in_range(device, "retry_count", options.retry_count, 0, 7)?;
        in_range(device, "rnr_retry", options.rnr_retry, 0, 7)?;
        if let Some(level) = options.service_level {
            in_range(device, "service_level", level, 0, 15)?;
        }
        if let Some(label) = options.flow_label {
            in_range(device, "flow_label", label, 0, 0xf_ffff)?;
        }
        if let Some(limit) = options.hop_limit {
            in_range(device, "hop_limit", limit, 1, u8::MAX)?;
        }
        let static_rate = options.static_rate.map(|rate| rate_code(device, rate, port.rate)).transpose()?;
        Ok(Self {
            pkey_index: pkey_index(context, options)?,
            service_level: options.service_level,
            traffic_class: options.traffic_class,
            flow_label: options.flow_label,
            hop_limit: options.hop_limit,
            static_rate,
        })
    }

    /// Sets what the options choose in an address vector.
    pub(crate) fn apply(&self, address: &mut ffi::ibv_ah_attr) {
        let Self { service_level, traffic_class, flow_label, hop_limit, static_rate, .. } = *self;
        let grh = &mut address.grh;
        grh.traffic_class = traffic_class.unwrap_or(grh.traffic_class);
        grh.flow_label = flow_label.unwrap_or(grh.flow_label);
        grh.hop_limit = hop_limit.unwrap_or(grh.hop_limit);
        address.sl = service_level.unwrap_or(address.sl);
        address.static_rate = static_rate.unwrap_or(address.static_rate);
    }

    /// Refuses another P_Key than that of the route, on which the connection manager has agreed with the peer.
    pub(crate) fn check_route(&self, context: &Context, index: u16) -> Result<()> {
        match self.pkey_index {
            Some(own) if own != index => Err(invalid(
                context.device_name(),
                "pkey",
                format!("index {own}"),
                format!(
                    "the P_Key of the route, at index {index}: leave the option out, or connect to an address in the partition"
                ),
            )),
            _ => Ok(()),
        }
    }
}

pub(super) fn invalid(device: &str, option: &'static str, value: impl Display, allowed: String) -> Error {
    Error::InvalidOption { device: device.into(), option, value: value.to_string(), allowed }
}

fn in_range<T: PartialOrd + Display>(
    device: &str,
    option: &'static str,
    value: T,
    least: T,
    most: T,
) -> Result<()> {
    if value >= least && value <= most {
        return Ok(());
    }
    Err(invalid(device, option, value, format!("{least} to {most}")))
}

/// The code of a rate in Mbit/s, if a port of `port` Mbit/s has it; 0 if that is not known.
fn rate_code(device: &str, rate: u32, port: u32) -> Result<u8> {
    // SAFETY: the function reads a table, and returns -1 for a code that it lacks.
    let of = |code: ffi::ibv_rate| u32::try_from(unsafe { ffi::ibv_rate_to_mbps(code) }).ok();
    let permitted = |of_code: u32| port == 0 || of_code <= port;
    let code = RATES.filter(|&code| of(code).is_some_and(permitted)).find(|&code| of(code) == Some(rate));
    match code {
        Some(code) => Ok(code as u8),
        None => {
            let mut all: Vec<_> = RATES.filter_map(of).filter(|&of_code| permitted(of_code)).collect();
            all.sort_unstable();
            let all: Vec<_> = all.iter().map(ToString::to_string).collect();
            let port = if port == 0 { String::new() } else { format!(", since the port has {port}") };
            Err(invalid(device, "static_rate", rate, format!("one of {} Mbit/s{port}", all.join(", "))))
        }
    }
}

/// The index of the P_Key that the options choose.
fn pkey_index(context: &Context, options: &QueuePairOptions) -> Result<Option<u16>> {
    let (by_index, by_value) = (options.pkey_index, options.pkey);
    if by_index.is_none() && by_value.is_none() {
        return Ok(None);
    }
    let table = context.pkeys(options.port)?;
    let has = || {
        let all: Vec<_> = table.iter().map(|(index, pkey)| format!("{pkey:#06x} at index {index}")).collect();
        format!("a P_Key of port {}, which has {}", options.port, all.join(", "))
    };
    let device = context.device_name();
    let found = match (by_index, by_value) {
        (Some(index), value) => {
            let entry = table.iter().find(|(of, pkey)| *of == index && value.is_none_or(|own| own == *pkey));
            entry.ok_or_else(|| invalid(device, "pkey_index", index, has()))?
        }
        (None, value) => {
            let wanted = value.unwrap_or_default();
            let same = |(_, pkey): &&(u16, u16)| *pkey == wanted;
            // A full member is in the partition that a limited member names, and the other way round.
            let partition = |(_, pkey): &&(u16, u16)| pkey & 0x7fff == wanted & 0x7fff;
            let entry = table.iter().find(same).or_else(|| table.iter().find(partition));
            entry.ok_or_else(|| invalid(device, "pkey", format!("{wanted:#06x}"), has()))?
        }
    };
    Ok(Some(found.0))
}

impl Context {
    /// Reads the P_Key table of port `number`, from 1: the index and value of each entry, without empty ones. The top
    /// bit of a value is set for a full member of the partition that the other 15 bits name.
    ///
    /// # Errors
    /// [`Error::Device`]: `EINVAL` if the device has no such port; the table cannot be read.
    #[doc(alias = "ibv_query_pkey")]
    pub fn pkeys(&self, number: u8) -> Result<Vec<(u16, u16)>> {
        let mut table = Vec::new();
        for index in 0..self.pkey_count(number)? {
            let mut pkey = 0;
            // SAFETY: the context is open, and `pkey` is a local variable for the answer.
            check(unsafe { ffi::ibv_query_pkey(self.as_raw().as_ptr(), number, index.into(), &mut pkey) })
                .map_err(self.failed(format!("read P_Key {index} of port {number}")))?;
            let pkey = u16::from_be(pkey);
            if pkey & 0x7fff != 0 {
                table.push((index, pkey));
            }
        }
        Ok(table)
    }
}

/// The rate of a port in Mbit/s from the codes of its width and its speed (`rdma/ib_verbs.h`); 0 if either is not
/// known.
pub(super) fn port_rate(width: u8, speed: u32) -> u32 {
    let lanes = match width {
        1 => 1,
        2 => 4,
        4 => 8,
        8 => 12,
        16 => 2,
        _ => 0,
    };
    let kbit: u64 = match speed {
        1 => 2_500_000,
        2 => 5_000_000,
        4 => 10_000_000,
        8 => 10_312_500,
        16 => 14_062_500,
        32 => 25_781_250,
        64 => 53_125_000,
        128 => 106_250_000,
        256 => 212_500_000,
        _ => 0,
    };
    (lanes * kbit / 1000) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_chosen_stays() {
        let mut address = ffi::ibv_ah_attr { sl: 3, static_rate: 2, ..Default::default() };
        (address.grh.traffic_class, address.grh.hop_limit, address.grh.flow_label) = (8, 64, 5);
        let before = address;
        Fabric::default().apply(&mut address);
        let parts = |a: &ffi::ibv_ah_attr| {
            (a.sl, a.static_rate, a.grh.traffic_class, a.grh.hop_limit, a.grh.flow_label)
        };
        assert_eq!(parts(&address), parts(&before));
        let all = Fabric {
            pkey_index: Some(1),
            service_level: Some(0),
            traffic_class: Some(0xff),
            flow_label: Some(0xf_ffff),
            hop_limit: Some(255),
            static_rate: Some(7),
        };
        all.apply(&mut address);
        assert_eq!(parts(&address), (0, 7, 0xff, 255, 0xf_ffff));
    }

    #[test]
    fn rates_are_those_of_libibverbs_up_to_the_ports() {
        assert_eq!(rate_code("mlx5_0", 2_500, 0).unwrap(), 2);
        assert_eq!(rate_code("mlx5_0", 103_125, port_rate(2, 32)).unwrap(), 16);
        assert_eq!(rate_code("mlx5_0", 10_000, 10_000).unwrap(), 3);
        let refused = rate_code("rxe0", 20_000, 10_000).unwrap_err().to_string();
        assert_eq!(
            refused,
            "rxe0: static_rate cannot be 20000: it is one of 2500, 5000, 10000 Mbit/s, since the port has 10000"
        );
        assert!(rate_code("rxe0", 7, 0).is_err());
    }

    #[test]
    fn a_port_has_the_rate_of_its_lanes() {
        // SDR x1, QDR x4, EDR x4, HDR x4, NDR x4, XDR x4, HDR x2.
        let rates = [(1, 1), (2, 4), (2, 32), (2, 64), (2, 128), (2, 256), (16, 64)]
            .map(|(width, speed)| port_rate(width, speed));
        assert_eq!(rates, [2_500, 40_000, 103_125, 212_500, 425_000, 850_000, 106_250]);
        assert_eq!((port_rate(0, 1), port_rate(2, 3)), (0, 0));
    }
}
