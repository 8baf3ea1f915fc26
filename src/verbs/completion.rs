//! Completions of work requests.

use std::ffi::CStr;
use std::fmt;

use ibverbs_sys as ffi;

use crate::kind::ErrorKind;

use super::error::{Error, Result};

/// A completed work request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
#[doc(alias = "ibv_wc")]
pub struct Completion {
    /// The identifier that the work request was posted with.
    pub wr_id: u64,
    /// Success, or the reason for the failure.
    pub status: CompletionStatus,
    /// Bytes transferred; meaningful for receives, READs and atomics that succeeded.
    pub byte_len: u32,
    /// Immediate data of a receive: the value that the sender passed.
    pub imm: Option<u32>,
    /// Number of the queue pair.
    pub qp_num: u32,
    /// The vendor's error code (syndrome) of a failure; 0 on success.
    pub vendor_err: u32,
}

impl Completion {
    /// Turns a failed completion into an error.
    ///
    /// # Errors
    /// [`Error::Completion`]: the status is not [`CompletionStatus::SUCCESS`].
    pub fn success(self) -> Result<Self> {
        match self.status {
            CompletionStatus::SUCCESS => Ok(self),
            status => Err(Error::Completion { wr_id: self.wr_id, status, vendor_err: self.vendor_err }),
        }
    }
}

impl From<ffi::ibv_wc> for Completion {
    fn from(wc: ffi::ibv_wc) -> Self {
        let (status, vendor_err) = wc.error().unwrap_or((CompletionStatus::SUCCESS.0, 0));
        Self {
            wr_id: wc.wr_id(),
            status: CompletionStatus(status),
            byte_len: wc.len() as u32,
            imm: wc.imm_data().map(u32::from_be),
            qp_num: wc.qp_num,
            vendor_err,
        }
    }
}

/// The status of a completion. Values that a later libibverbs adds are kept as they are.
///
/// Source: `enum ibv_wc_status` in `infiniband/verbs.h`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[doc(alias = "ibv_wc_status")]
pub struct CompletionStatus(pub u32);

macro_rules! statuses {
    ($($name:ident = $raw:ident: $text:literal;)*) => {
        impl CompletionStatus {
            $(#[doc = concat!($text, ".")] pub const $name: Self = Self(ffi::ibv_wc_status::$raw);)*

            /// The constant's name and its usual meaning; `None` for an unknown value.
            fn known(self) -> Option<(&'static str, &'static str)> {
                match self { $(Self::$name => Some((stringify!($name), $text)),)* _ => None }
            }
        }
    };
}

statuses! {
    SUCCESS = IBV_WC_SUCCESS: "success";
    LOC_LEN_ERR = IBV_WC_LOC_LEN_ERR: "the message is longer than the receive, or than the port's limit";
    LOC_QP_OP_ERR = IBV_WC_LOC_QP_OP_ERR: "the queue pair does not support this operation";
    LOC_PROT_ERR = IBV_WC_LOC_PROT_ERR: "a local key does not cover the bytes, or does not permit this access";
    WR_FLUSH_ERR = IBV_WC_WR_FLUSH_ERR: "flushed: the queue pair is in the error state";
    MW_BIND_ERR = IBV_WC_MW_BIND_ERR: "a memory window could not be bound";
    BAD_RESP_ERR = IBV_WC_BAD_RESP_ERR: "the peer's response was invalid";
    LOC_ACCESS_ERR = IBV_WC_LOC_ACCESS_ERR: "the peer's WRITE violated the protection of local memory";
    REM_INV_REQ_ERR = IBV_WC_REM_INV_REQ_ERR: "the peer found the request invalid";
    REM_ACCESS_ERR = IBV_WC_REM_ACCESS_ERR: "the remote key does not cover the bytes, or does not permit this access";
    REM_OP_ERR = IBV_WC_REM_OP_ERR: "the peer failed to complete the operation";
    RETRY_EXC_ERR = IBV_WC_RETRY_EXC_ERR: "the peer did not answer: check that it is alive and connected, and that the path is up";
    RNR_RETRY_EXC_ERR = IBV_WC_RNR_RETRY_EXC_ERR: "the peer had no receive posted";
    REM_ABORT_ERR = IBV_WC_REM_ABORT_ERR: "the peer aborted";
    FATAL_ERR = IBV_WC_FATAL_ERR: "the device failed";
    RESP_TIMEOUT_ERR = IBV_WC_RESP_TIMEOUT_ERR: "the response timed out";
    GENERAL_ERR = IBV_WC_GENERAL_ERR: "a transport error";
}

impl CompletionStatus {
    /// The kind of an error with this status.
    pub(crate) fn kind(self) -> ErrorKind {
        match self {
            Self::RETRY_EXC_ERR | Self::RNR_RETRY_EXC_ERR | Self::RESP_TIMEOUT_ERR | Self::REM_ABORT_ERR => {
                ErrorKind::PeerGone
            }
            Self::FATAL_ERR => ErrorKind::DeviceGone,
            Self::LOC_LEN_ERR | Self::LOC_PROT_ERR | Self::LOC_ACCESS_ERR | Self::LOC_QP_OP_ERR => {
                ErrorKind::Misuse
            }
            _ => ErrorKind::Transport,
        }
    }
}

impl fmt::Debug for CompletionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.known() {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "CompletionStatus({})", self.0),
        }
    }
}

impl fmt::Display for CompletionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, text)) = self.known() {
            return write!(f, "{name} ({text})");
        }
        // SAFETY: the function accepts any value and returns a static string.
        let text = unsafe { CStr::from_ptr(ffi::ibv_wc_status_str(self.0)) };
        write!(f, "status {} ({})", self.0, text.to_string_lossy())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_named_and_unknown_ones_survive() {
        let status = CompletionStatus::REM_ACCESS_ERR;
        assert_eq!(format!("{status:?}"), "REM_ACCESS_ERR");
        assert!(status.to_string().starts_with("REM_ACCESS_ERR (the remote key"));
        assert_eq!(CompletionStatus(10), status);
        assert_eq!(format!("{:?}", CompletionStatus(999)), "CompletionStatus(999)");
        assert!(CompletionStatus(999).to_string().starts_with("status 999 ("));
    }

    #[test]
    fn a_failed_completion_is_an_error_with_its_request() {
        let failed = Completion::from(ffi::ibv_wc::default());
        assert_eq!(failed.status, CompletionStatus::GENERAL_ERR);
        assert!(matches!(failed.success(), Err(Error::Completion { wr_id: 0, .. })));
    }
}
