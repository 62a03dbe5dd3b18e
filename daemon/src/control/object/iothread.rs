//! Objects of type `iothread`: a thread that runs requests of exports, and its properties.

use super::{UserObject, integer};
use io::IoThread;
use qapi::types::qom::IothreadProperties;
use qapi::{Error, Result, Value};
use std::sync::Arc;

/// Limits of the pool of an IOThread, as its properties.
#[derive(Clone, Copy)]
struct PoolLimits {
    min: i64,
    max: i64,
}

/// A thread of the user's.
pub struct Iothread {
    thread: Arc<IoThread>,
    limits: PoolLimits,
}

/// The limits as the thread takes them.
fn pool_limits(limits: PoolLimits) -> Result<(usize, usize)> {
    let within = |name: &str, value: i64| {
        usize::try_from(value).map_err(|_| Error::generic(format!("{name} value must be in range [0, {}]", i64::MAX)))
    };
    let (min, max) = (within("thread-pool-min", limits.min)?, within("thread-pool-max", limits.max)?);
    if max == 0 || min > max {
        return Err(Error::generic("bad thread-pool-min/thread-pool-max values"));
    }
    Ok((min, max))
}

impl Iothread {
    /// Starts the thread of the object `id`.
    pub fn start(id: &str, properties: &IothreadProperties) -> Result<Self> {
        let defaults = io::Params::default();
        let limits = PoolLimits {
            min: properties.thread_pool_min.unwrap_or(i64::try_from(defaults.thread_pool_min).unwrap_or(0)),
            max: properties.thread_pool_max.unwrap_or(i64::try_from(defaults.thread_pool_max).unwrap_or(i64::MAX)),
        };
        let (thread_pool_min, thread_pool_max) = pool_limits(limits)?;
        let params = io::Params { thread_pool_min, thread_pool_max, ..defaults };
        // The thread's name is what `top` and `ps` show.
        let thread = IoThread::start(&format!("IO {id}"), params)
            .map_err(|error| Error::io(format!("Could not start iothread '{id}'"), error))?;
        Ok(Self { thread, limits })
    }

    /// The thread.
    pub fn thread(&self) -> &Arc<IoThread> {
        &self.thread
    }
}

impl UserObject for Iothread {
    fn get(&self, name: &str) -> Option<Value> {
        match name {
            "thread-pool-min" => Some(self.limits.min.into()),
            "thread-pool-max" => Some(self.limits.max.into()),
            _ => None,
        }
    }

    fn set(&mut self, name: &str, value: &Value) -> Result<()> {
        let mut limits = self.limits;
        let value = integer(name, value)?;
        match name {
            "thread-pool-min" => limits.min = value,
            _ => limits.max = value,
        }
        let (min, max) = pool_limits(limits)?;
        self.thread.set_thread_pool(min, max);
        self.limits = limits;
        Ok(())
    }
}
