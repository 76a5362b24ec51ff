// The compound types of org.virt's interfaces for Qt's D-Bus: what the annotations in the interface files name.
//
// Give this file to the generator and call virtRegisterTypes() once before the first call:
//
//   qdbusxml2cpp -i virt-qtypes.h -p manager /usr/share/dbus-1/interfaces/org.virt.Manager.xml

#ifndef VIRT_QTYPES_H
#define VIRT_QTYPES_H

#include <QtCore/QList>
#include <QtCore/QMap>
#include <QtCore/QMetaType>
#include <QtCore/QString>
#include <QtCore/QVariantMap>
#include <QtDBus/QDBusArgument>
#include <QtDBus/QDBusMetaType>
#include <QtDBus/QDBusObjectPath>

/// One machine of Manager.ListDomains.
struct VirtListedDomain {
    QDBusObjectPath path;
    QString name;
    QString uuid;
    QString state;
    bool persistent = false;
};
using VirtListedDomains = QList<VirtListedDomain>;

/// One finding of Manager.ValidateDomain; line and column count from 1, and are 0 where there is none.
struct VirtFinding {
    QString severity;
    uint line = 0;
    uint column = 0;
    QString message;
};
using VirtFindings = QList<VirtFinding>;

/// One difference of Manager.CompareDomains; a side that lacks the value is empty.
struct VirtDifference {
    QString path;
    QString source;
    QString target;
};
using VirtDifferences = QList<VirtDifference>;

/// One secret of Manager.Secret.ListSecrets.
struct VirtListedSecret {
    QDBusObjectPath path;
    QString uuid;
    QString type;
    QString id;
};
using VirtListedSecrets = QList<VirtListedSecret>;

/// One user of an object, as in Secret.Users: the place is a disk, or empty; how is live, config, snapshot, backing or foreign.
struct VirtUser {
    QDBusObjectPath object;
    QString place;
    QString how;
};
using VirtUsers = QList<VirtUser>;

/// One pool of Manager.Storage.ListStoragePools.
struct VirtListedPool {
    QDBusObjectPath path;
    QString name;
    QString uuid;
    QString state;
    bool persistent = false;
};
using VirtListedPools = QList<VirtListedPool>;

/// One volume of StoragePool.ListVolumes; sizes in bytes.
struct VirtListedVolume {
    QDBusObjectPath path;
    QString name;
    QString format;
    qulonglong capacity = 0;
    qulonglong allocation = 0;
};
using VirtListedVolumes = QList<VirtListedVolume>;

/// One problem of an object: a word, and a sentence with what to do.
struct VirtProblem {
    QString word;
    QString text;
};
using VirtProblems = QList<VirtProblem>;

/// The types of pool of Manager.Storage.PoolTypes, each with what can be done with it.
using VirtPoolTypes = QMap<QString, QVariantMap>;

/// One disk of Snapshot.Disks.
struct VirtSnapshotDisk {
    QString target;
    QString mode;
    QString file;
};
using VirtSnapshotDisks = QList<VirtSnapshotDisk>;

/// An address with the length of its prefix, 0 if that is not known.
struct VirtAddress {
    QString address;
    uint prefix = 0;
};

/// One card of Domain.GetInterfaceAddresses; a text is empty where there is none.
struct VirtInterfaceAddress {
    QString name;
    QString mac;
    QString target;
    QList<VirtAddress> addresses;
};
using VirtInterfaceAddresses = QList<VirtInterfaceAddress>;

/// The keys of Domain.SendKey, as codes of its codeset.
using VirtKeyCodes = QList<uint>;

/// One machine of StatsSubscription.Stats, with what Domain.GetStats gives of it.
struct VirtMachineStats {
    QDBusObjectPath domain;
    QVariantMap values;
};
using VirtMachinesStats = QList<VirtMachineStats>;

/// The sizes of Domain.BlockInfo, in bytes; 0 is not known.
struct VirtDiskSizes {
    qulonglong capacity = 0;
    qulonglong allocation = 0;
    qulonglong physical = 0;
};

/// One device of Manager.NodeDevice.ListNodeDevices; the host itself has no parent.
struct VirtListedNodeDevice {
    QDBusObjectPath path;
    QString name;
    QString deviceClass;
    QString parent;
};
using VirtListedNodeDevices = QList<VirtListedNodeDevice>;

/// Who needs an object, as in NodeDevice.Users: the object, where in it, and how.
struct VirtUser {
    QDBusObjectPath object;
    QString place;
    QString how;
};
using VirtUsers = QList<VirtUser>;

/// The devices of Domain.Disks and the like, a dictionary each.
using VirtDevices = QList<QVariantMap>;

/// An entry of Network.Problems.
struct VirtProblem {
    QString token;
    QString sentence;
};
using VirtProblems = QList<VirtProblem>;

/// An entry of Network.Hosts.
struct VirtReservation {
    QString mac;
    QString address;
    QString name;
};
using VirtReservations = QList<VirtReservation>;

/// An entry of Network.Leases.
struct VirtLease {
    QString mac;
    QString address;
    QString hostName;
    QDBusObjectPath domain;
};
using VirtLeases = QList<VirtLease>;

Q_DECLARE_METATYPE(VirtProblem)
Q_DECLARE_METATYPE(VirtReservation)
Q_DECLARE_METATYPE(VirtLease)
Q_DECLARE_METATYPE(VirtListedDomain)
Q_DECLARE_METATYPE(VirtDiskSizes)
Q_DECLARE_METATYPE(VirtListedNodeDevice)
Q_DECLARE_METATYPE(VirtUser)
Q_DECLARE_METATYPE(VirtFinding)
Q_DECLARE_METATYPE(VirtDifference)
Q_DECLARE_METATYPE(VirtListedSecret)
Q_DECLARE_METATYPE(VirtUser)
Q_DECLARE_METATYPE(VirtListedPool)
Q_DECLARE_METATYPE(VirtListedVolume)
Q_DECLARE_METATYPE(VirtProblem)
Q_DECLARE_METATYPE(VirtPoolTypes)
Q_DECLARE_METATYPE(VirtSnapshotDisk)
Q_DECLARE_METATYPE(VirtMachineStats)
Q_DECLARE_METATYPE(VirtAddress)
Q_DECLARE_METATYPE(VirtInterfaceAddress)

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtListedDomain &one)
{
    out.beginStructure();
    out << one.path << one.name << one.uuid << one.state << one.persistent;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtListedDomain &one)
{
    in.beginStructure();
    in >> one.path >> one.name >> one.uuid >> one.state >> one.persistent;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtFinding &one)
{
    out.beginStructure();
    out << one.severity << one.line << one.column << one.message;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtFinding &one)
{
    in.beginStructure();
    in >> one.severity >> one.line >> one.column >> one.message;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtDifference &one)
{
    out.beginStructure();
    out << one.path << one.source << one.target;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtDifference &one)
{
    in.beginStructure();
    in >> one.path >> one.source >> one.target;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtListedSecret &one)
{
    out.beginStructure();
    out << one.path << one.uuid << one.type << one.id;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtListedSecret &one)
{
    in.beginStructure();
    in >> one.path >> one.uuid >> one.type >> one.id;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtUser &one)
{
    out.beginStructure();
    out << one.object << one.place << one.how;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtUser &one)
{
    in.beginStructure();
    in >> one.object >> one.place >> one.how;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtListedPool &one)
{
    out.beginStructure();
    out << one.path << one.name << one.uuid << one.state << one.persistent;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtListedPool &one)
{
    in.beginStructure();
    in >> one.path >> one.name >> one.uuid >> one.state >> one.persistent;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtListedVolume &one)
{
    out.beginStructure();
    out << one.path << one.name << one.format << one.capacity << one.allocation;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtListedVolume &one)
{
    in.beginStructure();
    in >> one.path >> one.name >> one.format >> one.capacity >> one.allocation;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtProblem &one)
{
    out.beginStructure();
    out << one.word << one.text;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtProblem &one)
{
    in.beginStructure();
    in >> one.word >> one.text;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtSnapshotDisk &one)
{
    out.beginStructure();
    out << one.target << one.mode << one.file;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtSnapshotDisk &one)
{
    in.beginStructure();
    in >> one.target >> one.mode >> one.file;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtAddress &one)
{
    out.beginStructure();
    out << one.address << one.prefix;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtAddress &one)
{
    in.beginStructure();
    in >> one.address >> one.prefix;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtInterfaceAddress &one)
{
    out.beginStructure();
    out << one.name << one.mac << one.target << one.addresses;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtInterfaceAddress &one)
{
    in.beginStructure();
    in >> one.name >> one.mac >> one.target >> one.addresses;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtMachineStats &one)
{
    out.beginStructure();
    out << one.domain << one.values;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtMachineStats &one)
{
    in.beginStructure();
    in >> one.domain >> one.values;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtListedNodeDevice &one)
{
    out.beginStructure();
    out << one.path << one.name << one.deviceClass << one.parent;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtListedNodeDevice &one)
{
    in.beginStructure();
    in >> one.path >> one.name >> one.deviceClass >> one.parent;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtUser &one)
{
    out.beginStructure();
    out << one.object << one.place << one.how;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtUser &one)
{
    in.beginStructure();
    in >> one.object >> one.place >> one.how;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtDiskSizes &one)
{
    out.beginStructure();
    out << one.capacity << one.allocation << one.physical;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtDiskSizes &one)
{
    in.beginStructure();
    in >> one.capacity >> one.allocation >> one.physical;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtProblem &one)
{
    out.beginStructure();
    out << one.token << one.sentence;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtProblem &one)
{
    in.beginStructure();
    in >> one.token >> one.sentence;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtReservation &one)
{
    out.beginStructure();
    out << one.mac << one.address << one.name;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtReservation &one)
{
    in.beginStructure();
    in >> one.mac >> one.address >> one.name;
    in.endStructure();
    return in;
}

inline QDBusArgument &operator<<(QDBusArgument &out, const VirtLease &one)
{
    out.beginStructure();
    out << one.mac << one.address << one.hostName << one.domain;
    out.endStructure();
    return out;
}

inline const QDBusArgument &operator>>(const QDBusArgument &in, VirtLease &one)
{
    in.beginStructure();
    in >> one.mac >> one.address >> one.hostName >> one.domain;
    in.endStructure();
    return in;
}

/// Makes the types above known to Qt's D-Bus.
inline void virtRegisterTypes()
{
    qDBusRegisterMetaType<VirtListedDomain>();
    qDBusRegisterMetaType<VirtListedDomains>();
    qDBusRegisterMetaType<VirtFinding>();
    qDBusRegisterMetaType<VirtFindings>();
    qDBusRegisterMetaType<VirtDifference>();
    qDBusRegisterMetaType<VirtDifferences>();
    qDBusRegisterMetaType<VirtListedSecret>();
    qDBusRegisterMetaType<VirtListedSecrets>();
    qDBusRegisterMetaType<VirtUser>();
    qDBusRegisterMetaType<VirtUsers>();
    qDBusRegisterMetaType<VirtListedPool>();
    qDBusRegisterMetaType<VirtListedPools>();
    qDBusRegisterMetaType<VirtListedVolume>();
    qDBusRegisterMetaType<VirtListedVolumes>();
    qDBusRegisterMetaType<VirtProblem>();
    qDBusRegisterMetaType<VirtProblems>();
    qDBusRegisterMetaType<VirtPoolTypes>();
    qDBusRegisterMetaType<VirtSnapshotDisk>();
    qDBusRegisterMetaType<VirtSnapshotDisks>();
    qDBusRegisterMetaType<VirtAddress>();
    qDBusRegisterMetaType<QList<VirtAddress>>();
    qDBusRegisterMetaType<VirtInterfaceAddress>();
    qDBusRegisterMetaType<VirtInterfaceAddresses>();
    qDBusRegisterMetaType<VirtKeyCodes>();
    qDBusRegisterMetaType<VirtMachineStats>();
    qDBusRegisterMetaType<VirtMachinesStats>();
    qDBusRegisterMetaType<VirtDiskSizes>();
    qDBusRegisterMetaType<VirtListedNodeDevice>();
    qDBusRegisterMetaType<VirtListedNodeDevices>();
    qDBusRegisterMetaType<VirtUser>();
    qDBusRegisterMetaType<VirtUsers>();
    qDBusRegisterMetaType<VirtDevices>();
    qDBusRegisterMetaType<VirtProblem>();
    qDBusRegisterMetaType<VirtProblems>();
    qDBusRegisterMetaType<VirtReservation>();
    qDBusRegisterMetaType<VirtReservations>();
    qDBusRegisterMetaType<VirtLease>();
    qDBusRegisterMetaType<VirtLeases>();
}

#endif
