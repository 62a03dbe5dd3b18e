//! Objects of type `iothread`: a thread that runs requests of exports, and its properties.

use super::{UserObject, integer};
use io::{IoThread, Polling};
use qapi::types::qom::IothreadProperties;
use qapi::{Error, Result, Value};
use std::sync::Arc;

/// Names and types of the properties.
pub const PROPERTIES: &[(&str, &str)] = &[
    ("thread-pool-min", "int"),
    ("aio-max-batch", "int"),
    ("thread-pool-max", "int"),
    ("poll-max-ns", "int"),
    ("poll-grow", "int"),
    ("poll-shrink", "int"),
];

/// `poll-max-ns` of a thread whose user gives none. As in QEMU it is then for queues in memory that it serves, and for other events
/// only while there are such: with sockets alone it was measured to cost up to twice the processor time a request and to gain
/// little at best.
const DEFAULT_POLL_MAX_NS: i64 = 32768;

/// The properties as the user sees them.
#[derive(Clone, Copy)]
pub(super) struct Values {
    aio_max_batch: i64,
    thread_pool_min: i64,
    thread_pool_max: i64,
    poll_max_ns: i64,
    /// The user has set that.
    polls_always: bool,
    poll_grow: i64,
    poll_shrink: i64,
}

/// A thread of the user's.
pub struct Iothread {
    thread: Arc<IoThread>,
    values: Values,
}

impl Values {
    pub(super) fn new(given: &IothreadProperties) -> Self {
        let defaults = io::Params::default();
        let or = |given: Option<i64>, default: usize| given.unwrap_or(i64::try_from(default).unwrap_or(i64::MAX));
        Self {
            aio_max_batch: given.aio_max_batch.unwrap_or(0),
            thread_pool_min: or(given.thread_pool_min, defaults.thread_pool_min),
            thread_pool_max: or(given.thread_pool_max, defaults.thread_pool_max),
            poll_max_ns: given.poll_max_ns.unwrap_or(DEFAULT_POLL_MAX_NS),
            polls_always: given.poll_max_ns.is_some(),
            poll_grow: given.poll_grow.unwrap_or(0),
            poll_shrink: given.poll_shrink.unwrap_or(0),
        }
    }

    pub(super) fn place(&mut self, name: &str) -> Option<&mut i64> {
        match name {
            "aio-max-batch" => Some(&mut self.aio_max_batch),
            "thread-pool-min" => Some(&mut self.thread_pool_min),
            "thread-pool-max" => Some(&mut self.thread_pool_max),
            "poll-max-ns" => Some(&mut self.poll_max_ns),
            "poll-grow" => Some(&mut self.poll_grow),
            "poll-shrink" => Some(&mut self.poll_shrink),
            _ => None,
        }
    }

    /// The values with another one for a property.
    pub(super) fn with(mut self, name: &str, value: &Value) -> Result<Self> {
        let value = integer(name, value)?;
        if let Some(place) = self.place(name) {
            *place = value;
        }
        self.polls_always |= name == "poll-max-ns";
        Ok(self)
    }

    /// The values as the thread takes them.
    pub(super) fn params(self) -> Result<io::Params> {
        let within = |name: &str, value: i64| {
            u64::try_from(value).map_err(|_| Error::generic(format!("{name} value must be in range [0, {}]", i64::MAX)))
        };
        // More than a ring holds is no limit.
        let max_batch = u32::try_from(within("aio-max-batch", self.aio_max_batch)?).unwrap_or(0);
        let min = within("thread-pool-min", self.thread_pool_min)?;
        let max = within("thread-pool-max", self.thread_pool_max)?;
        let polling = Polling {
            max_ns: within("poll-max-ns", self.poll_max_ns)?,
            grow: within("poll-grow", self.poll_grow)?,
            shrink: within("poll-shrink", self.poll_shrink)?,
            for_queues: !self.polls_always,
        };
        match (usize::try_from(min), usize::try_from(max)) {
            (Ok(thread_pool_min), Ok(thread_pool_max)) if max != 0 && min <= max && i32::try_from(max).is_ok() => {
                Ok(io::Params { thread_pool_min, thread_pool_max, polling, max_batch, ..io::Params::default() })
            }
            _ => Err(Error::generic("bad thread-pool-min/thread-pool-max values")),
        }
    }
}

impl Iothread {
    /// Starts the thread of the object `id`.
    pub fn start(id: &str, properties: &IothreadProperties) -> Result<Self> {
        let values = Values::new(properties);
        // The thread's name is what `top` and `ps` show.
        let thread = IoThread::start(&format!("IO {id}"), values.params()?)
            .map_err(|error| Error::io(format!("Could not start iothread '{id}'"), error))?;
        Ok(Self { thread, values })
    }

    /// The thread.
    pub fn thread(&self) -> &Arc<IoThread> {
        &self.thread
    }
}

impl UserObject for Iothread {
    fn get(&self, name: &str) -> Option<Value> {
        let mut values = self.values;
        values.place(name).map(|value| (*value).into())
    }

    fn set(&mut self, name: &str, value: &Value) -> Result<()> {
        let values = self.values.with(name, value)?;
        let params = values.params()?;
        self.thread.set_thread_pool(params.thread_pool_min, params.thread_pool_max);
        self.thread.set_polling(params.polling);
        self.thread.set_max_batch(params.max_batch);
        self.values = values;
        Ok(())
    }
}
