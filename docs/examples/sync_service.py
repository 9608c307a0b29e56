"""A sync service and its job, over a classic Session of psycopg: `python sync_service.py`; `jobs.modules` names it."""

from sqlalchemy import create_engine, make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from worker import SyncPublisher, database_url, job, load_settings


class Base(DeclarativeBase): ...


class Parcel(Base):
    __tablename__ = "parcel"
    id: Mapped[int] = mapped_column(primary_key=True)
    sent: Mapped[bool] = mapped_column(default=False)


@job
def send(session: Session, parcel_id: int) -> None:
    session.get_one(Parcel, parcel_id).sent = True


if __name__ == "__main__":
    engine = create_engine(make_url(database_url(load_settings())).set(drivername="postgresql+psycopg"))
    Base.metadata.create_all(engine)
    with sessionmaker(engine, info=SyncPublisher.from_settings().info).begin() as session:
        session.add(parcel := Parcel())
        session.flush()
        print(send.enqueue(session, parcel_id=parcel.id).id)
