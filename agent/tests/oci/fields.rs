//! The fields of a JSON document by their paths: `a.b[].c` is a field of each element of a list, `a.*` each value of a map whose keys are
//! free.

use std::cell::RefCell;
use std::fmt;

use oci_spec::runtime::Spec;
use serde::Deserialize;
use serde::de::value::StrDeserializer;
use serde::de::{DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Error, Map, Value};

/// The maps of a specification whose keys are not fields.
const MAPS: [&str; 6] = [
    "annotations",
    "linux.netDevices",
    "linux.resources.rdma",
    "linux.resources.unified",
    "linux.sysctl",
    "linux.timeOffsets",
];

/// The path of a key in the object at `path`.
fn below(path: &str, key: &str) -> String {
    match path {
        "" => key.into(),
        path if MAPS.contains(&path) => format!("{path}.*"),
        path => format!("{path}.{key}"),
    }
}

/// The paths of all fields that are no objects and no lists of objects.
pub fn leaves(document: &Value) -> Vec<String> {
    fn walk(path: String, value: &Value, leaves: &mut Vec<String>) {
        match value {
            Value::Object(object) => {
                for (key, value) in object {
                    walk(below(&path, key), value, leaves);
                }
            }
            Value::Array(list) if list.iter().any(Value::is_object) => {
                for value in list {
                    walk(format!("{path}[]"), value, leaves);
                }
            }
            _ => leaves.push(path),
        }
    }
    let mut leaves = Vec::new();
    walk(String::new(), document, &mut leaves);
    leaves
}

/// Calls `act` with each object that holds the last part of a path, and with that part.
fn visit(document: &mut Value, path: &str, act: &mut dyn FnMut(&mut Map<String, Value>, &str)) {
    let (first, rest) = path.split_once('.').unwrap_or((path, ""));
    let key = first.trim_end_matches("[]");
    let Some(object) = document.as_object_mut() else {
        return;
    };
    if rest.is_empty() {
        if key == "*" {
            let keys: Vec<_> = object.keys().cloned().collect();
            keys.iter().for_each(|key| act(object, key));
        } else {
            act(object, key);
        }
        return;
    }
    let values: Vec<&mut Value> = match key {
        "*" => object.values_mut().collect(),
        key => object.get_mut(key).into_iter().collect(),
    };
    for value in values {
        match value {
            Value::Array(list) => list.iter_mut().for_each(|value| visit(value, rest, act)),
            value => visit(value, rest, act),
        }
    }
}

/// The values of all fields with a path.
pub fn get(document: &Value, path: &str) -> Vec<Value> {
    let mut found = Vec::new();
    visit(&mut document.clone(), path, &mut |object, key| {
        found.extend(object.get(key).cloned());
    });
    found
}

/// Removes all fields with a path.
pub fn remove(document: &mut Value, path: &str) {
    visit(document, path, &mut |object, key| {
        object.remove(key);
    });
}

/// Sets all fields with a path to a value; a list of other things gains it.
pub fn set(document: &mut Value, path: &str, value: &Value) {
    visit(
        document,
        path,
        &mut |object, key| match object.get_mut(key) {
            Some(Value::Array(list)) if !value.is_array() => list.push(value.clone()),
            _ => drop(object.insert(key.into(), value.clone())),
        },
    );
}

/// The fields that the types of a specification have and a document has not.
pub fn missing(document: &Value) -> Vec<String> {
    let missing = RefCell::new(Vec::new());
    Spec::deserialize(Reader {
        path: String::new(),
        value: document,
        missing: &missing,
    })
    .unwrap();
    missing.into_inner()
}

/// Reads a document, and notes which of the fields that it is asked for are not there.
struct Reader<'a> {
    path: String,
    value: &'a Value,
    missing: &'a RefCell<Vec<String>>,
}

impl<'a> Reader<'a> {
    fn at(&self, path: String, value: &'a Value) -> Self {
        Self {
            path,
            value,
            missing: self.missing,
        }
    }
}

impl<'de> Deserializer<'de> for Reader<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value {
            Value::Array(list) => visitor.visit_seq(Elements(&self, list.iter())),
            Value::Object(object) => visitor.visit_map(Entries(&self, object.iter(), None)),
            plain => plain.clone().deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let absent = fields
            .iter()
            .filter(|&&field| self.value.get(field).is_none());
        self.missing
            .borrow_mut()
            .extend(absent.map(|field| below(&self.path, field)));
        self.deserialize_any(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let name: StrDeserializer<'_, Error> =
            self.value.as_str().unwrap_or_default().into_deserializer();
        visitor.visit_enum(name)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map
        identifier ignored_any
    }
}

struct Elements<'a>(&'a Reader<'a>, std::slice::Iter<'a, Value>);

impl<'de> SeqAccess<'de> for Elements<'_> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Error> {
        let path = format!("{}[]", self.0.path);
        let element = self.1.next().map(|value| self.0.at(path, value));
        element.map(|element| seed.deserialize(element)).transpose()
    }
}

struct Entries<'a>(
    &'a Reader<'a>,
    serde_json::map::Iter<'a>,
    Option<Reader<'a>>,
);

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some((key, value)) = self.1.next() else {
            return Ok(None);
        };
        self.2 = Some(self.0.at(below(&self.0.path, key), value));
        let key: StrDeserializer<'_, Error> = key.as_str().into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        match self.2.take() {
            Some(value) => seed.deserialize(value),
            None => Err(serde::de::Error::custom("a value without a key")),
        }
    }
}

impl fmt::Debug for Reader<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.path)
    }
}
