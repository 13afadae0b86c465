//! Link-layer addresses and VXLAN network identifiers, with one checked
//! constructor each. Text and serde forms exist for user space only.

/// A 48-bit Ethernet address in transmission order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    pub const ZERO: Self = Self([0; 6]);

    /// Group bit (IEEE 802 I/G): multicast or broadcast.
    #[inline(always)]
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// An address that a single station can own: neither group nor all zero.
    pub const fn is_station(self) -> bool {
        let b = self.0;
        !self.is_multicast() && (b[0] | b[1] | b[2] | b[3] | b[4] | b[5]) != 0
    }

    /// The six bytes as the low 48 bits of an integer, first byte lowest.
    #[inline(always)]
    pub const fn to_bits(self) -> u64 {
        let b = self.0;
        u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], 0, 0])
    }

    /// Inverse of [`MacAddr::to_bits`]; the upper 16 bits are ignored.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        let b = bits.to_le_bytes();
        Self([b[0], b[1], b[2], b[3], b[4], b[5]])
    }
}

/// VXLAN network identifier, 24 bits (RFC 7348 section 5).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct Vni(u32);

impl Vni {
    /// Largest identifier, 2^24 - 1.
    pub const MAX: u32 = 0xff_ffff;

    /// `None` above [`Vni::MAX`].
    pub const fn new(value: u32) -> Option<Self> {
        if value <= Self::MAX {
            Some(Self(value))
        } else {
            None
        }
    }

    pub const fn get(self) -> u32 {
        self.0
    }
}

#[cfg(any(test, feature = "user"))]
mod text {
    use super::{MacAddr, Vni};
    use std::fmt;
    use std::str::FromStr;

    impl fmt::Display for MacAddr {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let [a, b, c, d, e, g] = self.0;
            write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
        }
    }

    impl fmt::Debug for MacAddr {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            fmt::Display::fmt(self, f)
        }
    }

    impl fmt::Display for Vni {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0.fmt(f)
        }
    }

    /// Why a text is no address or identifier.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub enum ParseError {
        Mac(String),
        Vni(String),
    }

    impl fmt::Display for ParseError {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match self {
                Self::Mac(text) => {
                    write!(f, "`{text}` is not a MAC address such as 02:00:00:00:00:01")
                }
                Self::Vni(text) => {
                    write!(
                        f,
                        "`{text}` is not a VNI: an integer from 0 to {}",
                        Vni::MAX
                    )
                }
            }
        }
    }

    impl std::error::Error for ParseError {}

    impl FromStr for MacAddr {
        type Err = ParseError;

        fn from_str(s: &str) -> Result<Self, ParseError> {
            let bad = || ParseError::Mac(s.to_owned());
            let mut bytes = [0; 6];
            let mut parts = s.split(':');
            for byte in &mut bytes {
                let part = parts.next().ok_or_else(bad)?;
                if part.is_empty() || part.len() > 2 || !part.bytes().all(|c| c.is_ascii_hexdigit())
                {
                    return Err(bad());
                }
                *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
            }
            match parts.next() {
                None => Ok(Self(bytes)),
                Some(_) => Err(bad()),
            }
        }
    }

    impl FromStr for Vni {
        type Err = ParseError;

        fn from_str(s: &str) -> Result<Self, ParseError> {
            s.parse()
                .ok()
                .and_then(Self::new)
                .ok_or_else(|| ParseError::Vni(s.to_owned()))
        }
    }
}

#[cfg(any(test, feature = "user"))]
pub use text::ParseError;

#[cfg(feature = "user")]
mod serde_impl {
    use super::{MacAddr, Vni};
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    impl Serialize for MacAddr {
        fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
            s.collect_str(self)
        }
    }

    impl<'de> Deserialize<'de> for MacAddr {
        fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
            String::deserialize(d)?.parse().map_err(D::Error::custom)
        }
    }

    impl Serialize for Vni {
        fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
            s.serialize_u32(self.get())
        }
    }

    impl<'de> Deserialize<'de> for Vni {
        fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
            let value = u32::deserialize(d)?;
            Self::new(value)
                .ok_or_else(|| D::Error::custom(super::ParseError::Vni(value.to_string())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_text_round_trips_and_rejects_near_misses() {
        let mac: MacAddr = "02:0a:FF:0:1:9e".parse().unwrap();
        assert_eq!(mac, MacAddr([2, 10, 255, 0, 1, 0x9e]));
        assert_eq!(mac.to_string(), "02:0a:ff:00:01:9e");
        assert_eq!(MacAddr::from_bits(mac.to_bits()), mac);
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "02:00:00:00:00:1g",
            "02-00-00-00-00-01",
            "+2:00:00:00:00:01",
            "002:0:0:0:0:1",
        ] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn vni_is_24_bits() {
        assert_eq!(Vni::new(Vni::MAX).unwrap().get(), 16_777_215);
        assert!(Vni::new(1 << 24).is_none());
        for bad in ["16777216", "-1", "", "0x10", "99999999999"] {
            assert!(bad.parse::<Vni>().is_err(), "{bad}");
        }
    }

    #[test]
    fn station_addresses_are_unicast_and_not_zero() {
        assert!(MacAddr([0, 0, 0, 0, 0, 1]).is_station());
        assert!(!MacAddr::ZERO.is_station());
        assert!(!MacAddr([1, 0, 0x5e, 0, 0, 1]).is_station());
    }
}
