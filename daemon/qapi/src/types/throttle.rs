//! Limits of throughput, and the group that shares them.

use crate::Qapi;

/// Limits of a throttle group. A total limit excludes one for reads or writes alone. 0 is no limit.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "2.11")]
pub struct ThrottleLimits {
    /// Requests a second.
    pub iops_total: Option<i64>,
    /// Requests a second while a burst lasts.
    pub iops_total_max: Option<i64>,
    /// How long a burst may last, in seconds; 1 when left out. Above 1 it needs `iops-total-max`.
    pub iops_total_max_length: Option<i64>,
    /// Reads a second.
    pub iops_read: Option<i64>,
    /// Reads a second while a burst lasts.
    pub iops_read_max: Option<i64>,
    /// How long a burst may last, in seconds; 1 when left out. Above 1 it needs `iops-read-max`.
    pub iops_read_max_length: Option<i64>,
    /// Writes a second.
    pub iops_write: Option<i64>,
    /// Writes a second while a burst lasts.
    pub iops_write_max: Option<i64>,
    /// How long a burst may last, in seconds; 1 when left out. Above 1 it needs `iops-write-max`.
    pub iops_write_max_length: Option<i64>,
    /// Bytes a second.
    pub bps_total: Option<i64>,
    /// Bytes a second while a burst lasts.
    pub bps_total_max: Option<i64>,
    /// How long a burst may last, in seconds; 1 when left out. Above 1 it needs `bps-total-max`.
    pub bps_total_max_length: Option<i64>,
    /// Bytes read a second.
    pub bps_read: Option<i64>,
    /// Bytes read a second while a burst lasts.
    pub bps_read_max: Option<i64>,
    /// How long a burst may last, in seconds; 1 when left out. Above 1 it needs `bps-read-max`.
    pub bps_read_max_length: Option<i64>,
    /// Bytes written a second.
    pub bps_write: Option<i64>,
    /// Bytes written a second while a burst lasts.
    pub bps_write_max: Option<i64>,
    /// How long a burst may last, in seconds; 1 when left out. Above 1 it needs `bps-write-max`.
    pub bps_write_max_length: Option<i64>,
    /// A longer request counts as that many requests as its length is a multiple of this many bytes, fractions
    /// included; 0 counts each as one.
    pub iops_size: Option<i64>,
}

/// Limits that several nodes share.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "2.11")]
pub struct ThrottleGroupProperties {
    /// The limits. They can be changed later: those that are left out keep their value then.
    pub limits: Option<ThrottleLimits>,
    /// `limits.iops-total`.
    #[qapi(unstable)]
    pub x_iops_total: Option<i64>,
    /// `limits.iops-total-max`.
    #[qapi(unstable)]
    pub x_iops_total_max: Option<i64>,
    /// `limits.iops-total-max-length`.
    #[qapi(unstable)]
    pub x_iops_total_max_length: Option<i64>,
    /// `limits.iops-read`.
    #[qapi(unstable)]
    pub x_iops_read: Option<i64>,
    /// `limits.iops-read-max`.
    #[qapi(unstable)]
    pub x_iops_read_max: Option<i64>,
    /// `limits.iops-read-max-length`.
    #[qapi(unstable)]
    pub x_iops_read_max_length: Option<i64>,
    /// `limits.iops-write`.
    #[qapi(unstable)]
    pub x_iops_write: Option<i64>,
    /// `limits.iops-write-max`.
    #[qapi(unstable)]
    pub x_iops_write_max: Option<i64>,
    /// `limits.iops-write-max-length`.
    #[qapi(unstable)]
    pub x_iops_write_max_length: Option<i64>,
    /// `limits.bps-total`.
    #[qapi(unstable)]
    pub x_bps_total: Option<i64>,
    /// `limits.bps-total-max`.
    #[qapi(unstable)]
    pub x_bps_total_max: Option<i64>,
    /// `limits.bps-total-max-length`.
    #[qapi(unstable)]
    pub x_bps_total_max_length: Option<i64>,
    /// `limits.bps-read`.
    #[qapi(unstable)]
    pub x_bps_read: Option<i64>,
    /// `limits.bps-read-max`.
    #[qapi(unstable)]
    pub x_bps_read_max: Option<i64>,
    /// `limits.bps-read-max-length`.
    #[qapi(unstable)]
    pub x_bps_read_max_length: Option<i64>,
    /// `limits.bps-write`.
    #[qapi(unstable)]
    pub x_bps_write: Option<i64>,
    /// `limits.bps-write-max`.
    #[qapi(unstable)]
    pub x_bps_write_max: Option<i64>,
    /// `limits.bps-write-max-length`.
    #[qapi(unstable)]
    pub x_bps_write_max_length: Option<i64>,
    /// `limits.iops-size`.
    #[qapi(unstable)]
    pub x_iops_size: Option<i64>,
}
