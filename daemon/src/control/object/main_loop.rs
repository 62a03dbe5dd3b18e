//! The object of type `main-loop`: properties of the daemon's first thread. There is one at most, and it stays.

use super::UserObject;
use super::iothread::Values;
use io::IoThread;
use qapi::types::qom::{IothreadProperties, MainLoopProperties};
use qapi::{Error, Result, Value};
use std::sync::Arc;

/// Names and types of the properties.
pub const PROPERTIES: &[(&str, &str)] =
    &[("thread-pool-min", "int"), ("aio-max-batch", "int"), ("thread-pool-max", "int")];

/// The first thread's properties.
pub struct MainLoop {
    thread: Arc<IoThread>,
    values: Values,
}

impl MainLoop {
    /// Takes the properties over for the calling thread.
    ///
    /// # Errors
    /// A value is out of its range.
    pub fn take(properties: &MainLoopProperties) -> Result<Self> {
        let values = Values::new(&IothreadProperties {
            aio_max_batch: properties.aio_max_batch,
            thread_pool_min: properties.thread_pool_min,
            thread_pool_max: properties.thread_pool_max,
            ..IothreadProperties::default()
        });
        let thread = IoThread::current().ok_or_else(|| Error::generic("the first thread has no event loop"))?;
        let mut this = Self { thread, values };
        this.apply(values)?;
        Ok(this)
    }

    fn apply(&mut self, values: Values) -> Result<()> {
        let params = values.params()?;
        self.thread.set_thread_pool(params.thread_pool_min, params.thread_pool_max);
        self.thread.set_max_batch(params.max_batch);
        self.values = values;
        Ok(())
    }
}

impl UserObject for MainLoop {
    fn get(&self, name: &str) -> Option<Value> {
        let mut values = self.values;
        PROPERTIES.iter().find(|(known, _)| *known == name)?;
        values.place(name).map(|value| (*value).into())
    }

    fn set(&mut self, name: &str, value: &Value) -> Result<()> {
        let values = self.values.with(name, value)?;
        self.apply(values)
    }

    fn is_in_use(&self) -> bool {
        // By the thread, which does not end.
        true
    }
}
